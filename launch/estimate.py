"""Time, communication, faults and cost of a run, and the layouts that could run it: pure arithmetic on a config.

Costs per step and rank: products grow with tokens x parameters / ranks; gradients and weights with parameters, whatever
the tokens; tensor-parallel sums with tokens x d_model x layers; context-parallel gathers with sequences x d_inner x
d_state x layers, whatever their length.
"""

import math
from dataclasses import dataclass, replace
from itertools import product

from launch.devices import GPUS, Gpu
from model.config import Recompute
from model.flops import matmul_parameters, parameter_count, train_flops_per_token, train_traffic
from train.config import EngineKind, Parallel, Precision, RunConfig
from train.plan import GIB, needs
from train.traffic import payloads


@dataclass
class PlanConfig:
    """Assumptions of a plan; units in the names, 1e9 bytes per second and rank where it says gbytes."""

    mfu: float
    price_per_gpu_hour: float
    node_gbytes: float
    network_gbytes: float
    storage_gbytes: float
    host_gbytes: float
    failures_per_1000_node_days: float

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ValueError(f"plan.mfu is {self.mfu}; it is a share of the peak, above 0 and at most 1")
        if min(self.node_gbytes, self.network_gbytes, self.storage_gbytes, self.host_gbytes) <= 0:
            raise ValueError("plan's rates must be above 0")


@dataclass
class PlannedRun(RunConfig):
    """A run with the assumptions of its plan."""

    plan: PlanConfig


def planned_gpu(run: RunConfig) -> Gpu:
    """The GPU of the run's cluster by its peak; an H100 where the config does not say."""
    return next((gpu for gpu in GPUS if gpu.flops == (run.cluster.peak_tflops or 0) * 1e12), GPUS[1])


def width(config: RunConfig) -> int:
    """Bytes per element of the type that products are taken in."""
    return 2 if config.parallel.precision is Precision.bf16 else 4


def roofline_seconds(config: RunConfig, gpu: Gpu) -> float:
    """Least seconds per token on one GPU at its datasheet's rates, with what is computed again."""
    c, traffic = config.model, train_traffic(config.model, width(config))
    products = train_flops_per_token(c) / gpu.flops
    scan = max(traffic.scan / gpu.bandwidth, traffic.specials / gpu.specials)
    scan *= 1 if config.parallel.context_parallel == 1 else 2  # pieces run once more, from zero
    rows = traffic.rows / gpu.bandwidth
    match config.parallel.recompute:
        case Recompute.full:
            return 4 / 3 * (products + scan + rows)
        case Recompute.selective:
            small = c.n_layer * c.d_inner * (2 * c.dt_rank + 2 * c.d_state)
            return products * (1 + small / (3 * matmul_parameters(c))) + 4 / 3 * scan + rows
    return products + scan + rows


def traffic_between_ranks(config: RunConfig, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends in a step of the full batch at the longest context, by what asks for them."""
    p = config.parallel
    sequences = config.schedule.batch_end * p.tensor_parallel * p.context_parallel / ranks
    sent = dict.fromkeys(("gradients", "weights", "tensor parallel", "context parallel"), 0.0)
    seq_len = max(stage.seq_len for stage in config.data.stages)
    micro_batches = math.ceil(sequences / (p.micro_batch_tokens // seq_len))
    for payload in payloads(config, ranks, sequences, micro_batches, seq_len):
        if payload.what in sent:  # norms and losses are a few bytes
            sent[payload.what] += payload.sent
    return sent


def communication_seconds(run: PlannedRun, ranks: int) -> float:
    """Seconds of a step's communication if nothing overlaps: inside a node where a group fits one, else between."""
    p = run.parallel
    inside, between = run.plan.node_gbytes * 1e9, run.plan.network_gbytes * 1e9
    local = run.cluster.ranks_per_node
    by = traffic_between_ranks(run, ranks)
    group = p.tensor_parallel * p.context_parallel
    seconds = (by["gradients"] + by["weights"]) / (inside if ranks <= local else between)
    seconds += by["tensor parallel"] / (inside if p.tensor_parallel <= local else between)
    return seconds + by["context parallel"] / (inside if group <= local else between)


def step_seconds(run: PlannedRun, ranks: int, gpu: Gpu) -> tuple[float, float]:
    """Seconds of computing and of communication of a full step.

    Computing at the plan's utilisation, and in proportion longer by what is computed again, by the roofline.
    """
    seq_len = max(stage.seq_len for stage in run.data.stages)
    tokens = run.schedule.batch_end * seq_len / ranks
    plain = replace(run, parallel=replace(run.parallel, recompute=Recompute.none, context_parallel=1))
    again = roofline_seconds(run, gpu) / roofline_seconds(plain, gpu)
    computing = tokens * train_flops_per_token(run.model) / (gpu.flops * run.plan.mfu) * again
    return computing, communication_seconds(run, ranks)


@dataclass
class Reliability:
    """What saving and failing cost."""

    checkpoint_bytes: int
    blocking_seconds: float  # a save stops training: each rank's part goes to its host
    writing_seconds: float  # and goes to storage in the background
    failures: float  # expected over the run
    interval_minutes: float  # best pause between saves: Young's sqrt(2 x blocking x mean time between failures)


def reliability(run: PlannedRun, ranks: int, days: float) -> Reliability:
    """Young's interval (J. W. Young, CACM 17(9), 1974), but no shorter than writing takes."""
    size = 12 * parameter_count(run.model)
    nodes = math.ceil(ranks / run.cluster.ranks_per_node)
    rate = nodes * run.plan.failures_per_1000_node_days / 1000  # per day
    blocking = size / ranks / (run.plan.host_gbytes * 1e9)
    writing = size / (run.plan.storage_gbytes * 1e9)
    best = math.sqrt(2 * blocking * 86400 / rate) if rate else math.inf
    return Reliability(size, blocking, writing, rate * days, max(best, writing) / 60)


@dataclass
class Layout:
    """One way to lay the run over its ranks."""

    tensor_parallel: int
    sequence_parallel: bool
    context_parallel: int
    zero_stage: int
    recompute: str
    memory_gib: float
    tokens_per_second: float  # of one rank; 0 where it cannot run
    why_not: str | None


def layouts(run: PlannedRun, ranks: int, gpu: Gpu, asked: Parallel | None = None) -> list[Layout]:
    """Every layout of tensor, sequence, context, ZeRO stage and recompute: the fastest that fits first, then others.

    With `asked`, stage and sequence parallelism are as asked for. Micro-batch, precision, engine are the run's.
    """
    found = []
    base = asked or run.parallel
    stages = [base.zero_stage] if asked or base.engine is EngineKind.megatron else [0, 1, 2, 3]
    for tensor, context, stage, recompute in product((1, 2, 4, 8), (1, 2, 4, 8), stages, Recompute):
        for sequence in [base.sequence_parallel and tensor > 1] if asked else [False, True][: 1 + (tensor > 1)]:
            parallel = replace(
                base,
                tensor_parallel=tensor,
                sequence_parallel=sequence,
                context_parallel=context,
                zero_stage=stage,
                recompute=recompute,
            )
            found.append(layout_of(run, parallel, ranks, gpu))
    return sorted(found, key=lambda layout: (layout.why_not is not None, -layout.tokens_per_second, layout.memory_gib))


def layout_of(run: PlannedRun, parallel: Parallel, ranks: int, gpu: Gpu) -> Layout:
    """What a layout needs and gives, or why it cannot run."""
    p = parallel
    shape = (p.tensor_parallel, p.sequence_parallel, p.context_parallel, p.zero_stage, p.recompute.value)
    if ranks % (p.tensor_parallel * p.context_parallel):
        return Layout(*shape, 0.0, 0.0, f"{p.tensor_parallel} x {p.context_parallel} does not divide {ranks} ranks")
    if run.schedule.batch_end < (groups := ranks // (p.tensor_parallel * p.context_parallel)):
        why = f"the full batch of {run.schedule.batch_end} sequences leaves some of {groups} groups without one"
        return Layout(*shape, 0.0, 0.0, why)
    try:
        other = replace(run, parallel=parallel)
    except ValueError as error:
        return Layout(*shape, 0.0, 0.0, str(error))
    memory = needs(other, ranks).total / GIB
    limit = run.cluster.memory_gib or gpu.memory_gib
    if memory > limit:
        return Layout(*shape, memory, 0.0, f"needs {memory:.0f} of {limit:.0f} GiB")
    seq_len = max(stage.seq_len for stage in run.data.stages)
    rate = run.schedule.batch_end * seq_len / ranks / sum(step_seconds(other, ranks, gpu))
    return Layout(*shape, memory, rate, None)


def nearest(run: PlannedRun, ranks: int, gpu: Gpu, asked: Parallel) -> Layout | None:
    """The layout that works and changes least of what was asked for; None when there is none."""
    kinds = list(Recompute)

    def distance(layout: Layout) -> tuple[float, float]:
        steps = abs(math.log2(layout.tensor_parallel / asked.tensor_parallel))
        steps += abs(math.log2(layout.context_parallel / asked.context_parallel))
        steps += abs(kinds.index(Recompute(layout.recompute)) - kinds.index(asked.recompute)) / len(kinds)
        return steps, -layout.tokens_per_second

    works = [layout for layout in layouts(run, ranks, gpu, asked) if layout.why_not is None]
    return min(works, key=distance, default=None)
