"""Time, communication and faults of a run: pure arithmetic on a config.

Costs per step and rank: products grow with tokens x parameters / ranks; gradients and weights with
parameters, whatever the tokens, so that they weigh most where the context is short; tensor-parallel
sums with tokens x d_model x layers; context-parallel gathers with sequences x d_inner x d_state x
layers, whatever their length.
"""

import math
from dataclasses import dataclass, replace

from launch.planning.devices import GPUS, Gpu
from model.config import Recompute
from model.flops import (
    matmul_parameters,
    parameter_count,
    train_flops_per_token,
    train_memory_traffic,
)
from train.config import EngineKind, RunConfig
from train.costs.traffic import step_traffic
from train.engines.partition import matmul_dtype_bytes
from train.schedule import Schedule


@dataclass
class PlanConfig:
    """Assumptions of a plan, units in the names; gbytes_per_second is 1e9 bytes/s per rank."""

    mfu: float
    node_gbytes_per_second: float
    network_gbytes_per_second: float
    storage_gbytes_per_second: float
    host_gbytes_per_second: float
    failures_per_1000_node_days: float

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ValueError(
                f"plan.mfu is {self.mfu}; it is a share of the peak, above 0 and at most 1"
            )
        if (
            min(
                self.node_gbytes_per_second,
                self.network_gbytes_per_second,
                self.storage_gbytes_per_second,
                self.host_gbytes_per_second,
            )
            <= 0
        ):
            raise ValueError("plan's rates must be above 0")


@dataclass
class PlannedRun(RunConfig):
    """A run with the assumptions of its plan."""

    plan: PlanConfig


def planned_gpu(run: RunConfig) -> Gpu:
    """The GPU of the run's cluster by its peak; an H100 where the config does not say."""
    return next(
        (gpu for gpu in GPUS if gpu.flops == (run.cluster.peak_tflops or 0) * 1e12), GPUS[1]
    )


def roofline_seconds(config: RunConfig, gpu: Gpu) -> float:
    """Least seconds per token and GPU at its datasheet's rates, with what is computed again.

    Tensor-parallel ranks each do the whole norms and residual additions, unless the sequence is cut
    over them too.
    """
    c, p, traffic = (
        config.model,
        config.parallel,
        train_memory_traffic(config.model, matmul_dtype_bytes(config)),
    )
    products = train_flops_per_token(c) / gpu.flops
    scan = max(traffic.scan / gpu.bandwidth, traffic.special_functions / gpu.special_functions)
    scan *= 1 if p.context_parallel == 1 else 2  # pieces run once more, from zero
    whole = 1 if p.sequence_parallel else p.tensor_parallel
    rows = (traffic.convolutions + whole * traffic.residual) / gpu.bandwidth
    match config.compute.recompute:
        case Recompute.full:
            return 4 / 3 * (products + scan + rows)
        case Recompute.selective:
            small = c.n_layer * c.d_inner * (2 * c.dt_rank + 2 * c.d_state)
            return products * (1 + small / (3 * matmul_parameters(c))) + 4 / 3 * scan + rows
    return products + scan + rows


@dataclass(frozen=True)
class Phase:
    """Steps of one size: of a stage with the full batch, or of the ramp within it."""

    name: str
    tokens: int
    seq_len: int
    # sequences of a step; of the ramp the mean, at which what a step sends is the mean too
    batch: float
    steps: float


def phases(run: RunConfig) -> list[Phase]:
    """Phases of the run. A batch linear in tokens from a to b has mean (b - a) / ln(b / a)."""
    schedule, found, begin = Schedule(run.schedule, run.optim.lr, run.data), [], 0
    for end, seq_len, name in schedule.stages:
        edge = min(max(begin, run.schedule.ramp_tokens), end)
        if edge > begin:
            first, last = schedule.batch(begin), schedule.batch(edge)
            mean = (last - first) / math.log(last / first) if last > first else first
            found.append(
                Phase(f"{name}, ramp", edge - begin, seq_len, mean, (edge - begin) / seq_len / mean)
            )
        if end > edge:
            batch = run.schedule.batch_end_sequences
            found.append(Phase(name, end - edge, seq_len, batch, (end - edge) / seq_len / batch))
        begin = end
    return found


def sequences_of_a_group(config: RunConfig, ranks: int, batch: float) -> int:
    """Sequences per step, serial or batched, of the fullest group of ranks; all wait for it."""
    return math.ceil(
        batch * config.parallel.tensor_parallel * config.parallel.context_parallel / ranks
    )


def traffic_between_ranks(
    config: RunConfig, ranks: int, batch: float, seq_len: int
) -> dict[str, float]:
    """Bytes that a rank sends in a step of `batch` sequences, by what asks for them."""
    sent = dict.fromkeys(("gradients", "weights", "tensor parallel", "context parallel"), 0.0)
    sequences = sequences_of_a_group(config, ranks, batch)
    micro_batches = math.ceil(sequences / (config.parallel.micro_batch_tokens // seq_len))
    for payload in step_traffic(config, ranks, sequences, micro_batches, seq_len):
        if payload.name in sent:  # norms and losses are a few bytes
            sent[payload.name] += payload.sent_bytes
    return sent


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    computing: float
    may_hide: float  # communication that can go on beside computing
    exposed: float  # communication that computing waits for

    @property
    def total(self) -> float:
        """All of it, one after another: nothing hides."""
        return self.computing + self.may_hide + self.exposed


def step_time(run: PlannedRun, ranks: int, gpu: Gpu, batch: float, seq_len: int) -> StepTime:
    """A step of `batch` sequences.

    Computing at the plan's utilisation, whatever the layout, and in proportion longer by what the
    layout computes again or more than once, by the roofline. Bytes at the plan's rates, inside a
    node where a group fits one, else between; no latency. Sums and gathers inside a layer are
    waited for. Gradients may hide behind the backward (not in stage 0), weights behind the next
    forward (megatron-core and stage 3).
    """
    p = run.parallel
    group = p.tensor_parallel * p.context_parallel
    tokens = sequences_of_a_group(run, ranks, batch) * seq_len / group
    plain = replace(
        run,
        parallel=replace(p, tensor_parallel=1, context_parallel=1, sequence_parallel=False),
        compute=replace(run.compute, recompute=Recompute.none),
    )
    again = roofline_seconds(run, gpu) / roofline_seconds(plain, gpu)
    computing = tokens * train_flops_per_token(run.model) / (gpu.flops * run.plan.mfu) * again
    sent = traffic_between_ranks(run, ranks, batch, seq_len)
    sizes = {
        "gradients": ranks,
        "weights": ranks,
        "tensor parallel": p.tensor_parallel,
        "context parallel": group,
    }
    seconds = {what: size / link(run, sizes[what]) for what, size in sent.items()}
    hiding = {"gradients"} if p.zero_stage else set()
    hiding |= {"weights"} if p.engine is EngineKind.megatron or p.zero_stage == 3 else set()
    behind = sum(seconds[what] for what in hiding)
    return StepTime(computing, behind, sum(seconds.values()) - behind)


def link(run: PlannedRun, ranks: int) -> float:
    """Bytes per second of a rank's link to the `ranks` of its group."""
    return 1e9 * (
        run.plan.node_gbytes_per_second
        if ranks <= run.cluster.ranks_per_node
        else run.plan.network_gbytes_per_second
    )


def timed(run: PlannedRun, ranks: int, gpu: Gpu) -> list[tuple[Phase, StepTime]]:
    """Every phase with the time of its steps."""
    known: dict[tuple[float, int], StepTime] = {}
    found = []
    for phase in phases(run):
        size = (phase.batch, phase.seq_len)
        if size not in known:
            known[size] = step_time(run, ranks, gpu, *size)
        found.append((phase, known[size]))
    return found


@dataclass
class Reliability:
    """Cost of saves and failures; lost shares are of the run's time, starts not counted."""

    checkpoint_bytes: int
    # a save stops training: megatron-core gathers weights, each part goes to its host
    blocking_seconds: float
    writing_seconds: float  # and goes to storage in the background
    failures: float  # expected over the run
    interval_minutes: float  # between saves as configured, at the mean pace
    lost: float  # share, by that
    # Young's sqrt(2 x blocking x mean time between failures), but no shorter than writing takes
    best_minutes: float
    best_lost: float


def reliability(run: PlannedRun, ranks: int, days: float) -> Reliability:
    """Saves every T s cost their blocking time and T / 2 per fault (Young, CACM 17(9), 1974)."""
    size = 12 * parameter_count(run.model)
    nodes = math.ceil(ranks / run.cluster.ranks_per_node)
    rate = nodes * run.plan.failures_per_1000_node_days / 1000 / 86400  # per second
    blocking = size / ranks / (run.plan.host_gbytes_per_second * 1e9)
    # its pieces() has the weights gathered before anything is read
    if run.parallel.engine is EngineKind.megatron:
        seq_len = max(stage.seq_len for stage in run.data.stages)
        sent = traffic_between_ranks(run, ranks, run.schedule.batch_end_sequences, seq_len)
        blocking += sent["weights"] / link(run, ranks)
    writing = size / (run.plan.storage_gbytes_per_second * 1e9)

    def lost(seconds: float) -> float:
        return blocking / seconds + rate * seconds / 2

    now = 86400 * days * min(1.0, run.checkpoint.every_tokens / run.tokens)
    best = max(math.sqrt(2 * blocking / rate), writing) if rate else 86400 * days
    return Reliability(
        size, blocking, writing, 86400 * rate * days, now / 60, lost(now), best / 60, lost(best)
    )
