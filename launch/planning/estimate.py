"""Estimates of a run's time, communication and failures: pure arithmetic on a config.

Costs per step and rank: matmul FLOPs grow with tokens x parameters / ranks. Gradient and weight
bytes grow with parameters and not with tokens, so they cost most at short context. Tensor-parallel
bytes grow with tokens x d_model x layers, context-parallel bytes with sequences x d_inner x d_state
x layers, independent of sequence length.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from core.ranges import Range
from model.config import Recompute
from model.flops import (
    matmul_parameters,
    parameter_count,
    train_flops_per_token,
    train_memory_traffic,
)
from train.config import EngineKind, RunConfig
from train.costs.gpus import GPUS, Gpu
from train.costs.traffic import step_traffic
from train.engines.partition import matmul_dtype_bytes
from train.schedule import Schedule

Rate = Annotated[float, Range(1e-6, 1e6)]


@dataclass
class PlanConfig:
    """Assumptions of a plan; gbytes_per_second is 1e9 bytes/s per rank."""

    mfu: Annotated[float, Range(1e-6, 1)]
    node_gbytes_per_second: Rate
    network_gbytes_per_second: Rate
    storage_gbytes_per_second: Rate
    host_gbytes_per_second: Rate
    failures_per_1000_node_days: Annotated[float, Range(0, 1e6)]


@dataclass
class PlannedRun(RunConfig):
    """A run's config with the assumptions of its plan."""

    plan: PlanConfig


def planned_gpu(run: RunConfig) -> Gpu:
    """The GPU whose peak FLOP/s equals the cluster config's; H100 SXM if none does."""
    return next(
        (gpu for gpu in GPUS if gpu.flops == (run.cluster.peak_tflops or 0) * 1e12), GPUS[1]
    )


def roofline_seconds(config: RunConfig, gpu: Gpu) -> float:
    """Minimum seconds per token and GPU at datasheet rates, including recomputation.

    Without sequence parallelism, each tensor-parallel rank computes all norms and residual adds.
    """
    c = config.model
    p = config.parallel
    traffic = train_memory_traffic(c, matmul_dtype_bytes(config))
    matmuls = train_flops_per_token(c) / gpu.flops
    scan = max(traffic.scan / gpu.bandwidth, traffic.special_functions / gpu.special_functions)
    if p.context_parallel > 1:
        scan *= 2  # each rank first scans its chunk from a zero state
    residual_copies = 1 if p.sequence_parallel else p.tensor_parallel
    elementwise = (traffic.convolutions + residual_copies * traffic.residual) / gpu.bandwidth
    match config.compute.recompute:
        case Recompute.full:
            return 4 / 3 * (matmuls + scan + elementwise)
        case Recompute.selective:
            x_proj_and_dt_proj = c.n_layer * c.d_inner * (2 * c.dt_rank + 2 * c.d_state)
            recomputed = x_proj_and_dt_proj / (3 * matmul_parameters(c))
            return matmuls * (1 + recomputed) + 4 / 3 * scan + elementwise
    return matmuls + scan + elementwise


@dataclass(frozen=True)
class SchedulePhase:
    """Steps of one size: a stage's steps at full batch, or the part of a stage within the ramp."""

    name: str
    tokens: int
    seq_len: int
    # sequences per step; mean over a ramp, which also gives the mean of the bytes sent
    batch: float
    steps: float


def schedule_phases(run: RunConfig) -> list[SchedulePhase]:
    """Phases of a run. The mean batch of a ramp linear in tokens is (b - a) / ln(b / a)."""
    schedule = Schedule(run.schedule, run.optim.lr, run.data)
    phases = []
    start = 0
    for end, seq_len, name in schedule.stages:
        ramp_end = min(max(start, run.schedule.ramp_tokens), end)
        if ramp_end > start:
            first, last = schedule.batch(start), schedule.batch(ramp_end)
            batch = (last - first) / math.log(last / first) if last > first else first
            tokens = ramp_end - start
            phases.append(
                SchedulePhase(f"{name}, ramp", tokens, seq_len, batch, tokens / seq_len / batch)
            )
        if end > ramp_end:
            batch = run.schedule.batch_end_sequences
            tokens = end - ramp_end
            phases.append(SchedulePhase(name, tokens, seq_len, batch, tokens / seq_len / batch))
        start = end
    return phases


def max_sequences_per_group(config: RunConfig, ranks: int, batch: float) -> int:
    """Sequences per step of the group of ranks with the most, which sets the step time."""
    return math.ceil(
        batch * config.parallel.tensor_parallel * config.parallel.context_parallel / ranks
    )


def bytes_sent_per_step(
    config: RunConfig, ranks: int, batch: float, seq_len: int
) -> dict[str, float]:
    """Bytes that a rank sends in a step of `batch` sequences, by purpose."""
    sent = dict.fromkeys(("gradients", "weights", "tensor parallel", "context parallel"), 0.0)
    sequences = max_sequences_per_group(config, ranks, batch)
    micro_batches = math.ceil(sequences / (config.parallel.micro_batch_tokens // seq_len))
    for payload in step_traffic(config, ranks, sequences, micro_batches, seq_len):
        if payload.name in sent:  # norms and losses are a few bytes
            sent[payload.name] += payload.sent_bytes
    return sent


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    overlappable: float  # communication that can overlap with compute
    exposed: float  # communication that compute waits for

    @property
    def total(self) -> float:
        """Seconds without any overlap."""
        return self.compute + self.overlappable + self.exposed


def step_time(run: PlannedRun, ranks: int, gpu: Gpu, batch: float, seq_len: int) -> StepTime:
    """Estimate a step of `batch` sequences.

    Compute runs at plan.mfu for every layout, scaled by the roofline of what the layout recomputes
    or computes on several ranks. Communication runs at the plan's rates, intra-node if the group
    fits a node, without latency. Collectives inside a layer are exposed. Gradients can overlap with
    the backward (not in ZeRO stage 0), weights with the next forward (megatron-core and stage 3).
    """
    p = run.parallel
    group = p.tensor_parallel * p.context_parallel
    tokens = max_sequences_per_group(run, ranks, batch) * seq_len / group
    baseline = replace(
        run,
        parallel=replace(p, tensor_parallel=1, context_parallel=1, sequence_parallel=False),
        compute=replace(run.compute, recompute=Recompute.none),
    )
    overhead = roofline_seconds(run, gpu) / roofline_seconds(baseline, gpu)
    compute = tokens * train_flops_per_token(run.model) / (gpu.flops * run.plan.mfu) * overhead
    sent = bytes_sent_per_step(run, ranks, batch, seq_len)
    group_sizes = {
        "gradients": ranks,
        "weights": ranks,
        "tensor parallel": p.tensor_parallel,
        "context parallel": group,
    }
    seconds = {what: size / link_bandwidth(run, group_sizes[what]) for what, size in sent.items()}
    overlappable = 0.0
    if p.zero_stage:
        overlappable += seconds["gradients"]
    if p.engine is EngineKind.megatron or p.zero_stage == 3:
        overlappable += seconds["weights"]
    return StepTime(compute, overlappable, sum(seconds.values()) - overlappable)


def link_bandwidth(run: PlannedRun, group_size: int) -> float:
    """Bytes per second of a rank within a group of `group_size` ranks."""
    return 1e9 * (
        run.plan.node_gbytes_per_second
        if group_size <= run.cluster.ranks_per_node
        else run.plan.network_gbytes_per_second
    )


def phase_times(run: PlannedRun, ranks: int, gpu: Gpu) -> list[tuple[SchedulePhase, StepTime]]:
    """Every phase with the time of one of its steps."""
    cache: dict[tuple[float, int], StepTime] = {}
    phases = []
    for phase in schedule_phases(run):
        size = (phase.batch, phase.seq_len)
        if size not in cache:
            cache[size] = step_time(run, ranks, gpu, *size)
        phases.append((phase, cache[size]))
    return phases


@dataclass
class Reliability:
    """Cost of checkpoints and failures; lost fractions are of the run's time, without restarts."""

    checkpoint_bytes: int
    # training stops while each rank copies its shard to the host
    blocking_seconds: float
    writing_seconds: float  # to storage, in the background
    failures: float  # expected over the run
    interval_minutes: float  # between saves as configured, at the mean pace
    lost: float  # fraction at that interval
    # Young's sqrt(2 x blocking x mean time between failures), at least the writing time
    best_minutes: float
    best_lost: float


def reliability(run: PlannedRun, ranks: int, days: float) -> Reliability:
    """Saving every T s costs the blocking time and T / 2 per failure (Young, CACM 17(9), 1974)."""
    size = 12 * parameter_count(run.model)
    nodes = math.ceil(ranks / run.cluster.ranks_per_node)
    failure_rate = nodes * run.plan.failures_per_1000_node_days / 1000 / 86400  # per second
    blocking = size / ranks / (run.plan.host_gbytes_per_second * 1e9)
    writing = size / (run.plan.storage_gbytes_per_second * 1e9)

    def lost(interval: float) -> float:
        return blocking / interval + failure_rate * interval / 2

    configured = 86400 * days * min(1.0, run.checkpoint.every_tokens / run.tokens)
    best = max(math.sqrt(2 * blocking / failure_rate), writing) if failure_rate else 86400 * days
    return Reliability(
        checkpoint_bytes=size,
        blocking_seconds=blocking,
        writing_seconds=writing,
        failures=86400 * failure_rate * days,
        interval_minutes=configured / 60,
        lost=lost(configured),
        best_minutes=best / 60,
        best_lost=lost(best),
    )
