"""Parallel layouts for a run: memory and throughput of each, or why it cannot run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from launch.planning.estimate import PlannedRun, phase_times
from model.config import Recompute
from train.config import EngineKind, Parallel
from train.costs.gpus import Gpu
from train.costs.memory import GIB, estimate_memory, headroom_bytes


@dataclass
class Layout:
    """One layout of a run; throughput is per rank over the whole run, 0 if it cannot run."""

    tensor_parallel: int
    sequence_parallel: bool
    context_parallel: int
    zero_stage: int
    recompute: str
    micro_batch_tokens: int
    memory_gib: float = 0.0
    tokens_per_second: float = 0.0  # without overlap
    tokens_per_second_hidden: float = 0.0  # all overlappable communication overlaps
    lacks: str | None = None  # "ranks", "sequences", "valid sizes" or "memory"
    unsupported_reason: str | None = None


def enumerate_layouts(
    run: PlannedRun, ranks: int, gpu: Gpu, requested: Parallel | None = None
) -> list[Layout]:
    """All combinations of TP, SP, CP, ZeRO stage and recompute, runnable ones first, by speed.

    `requested` fixes ZeRO stage and sequence parallelism. Precision and engine are the run's.
    Larger micro-batches are tried only in ZeRO stages 2 and 3, which communicate in every
    micro-batch; in the other stages they only cost memory.
    """
    base = requested or run.parallel
    layouts = [
        evaluate_layout(run, parallel, recompute, ranks, gpu)
        for parallel, recompute in _candidates(base, is_fixed=requested is not None)
    ]
    return sorted(
        layouts,
        key=lambda layout: (
            layout.unsupported_reason is not None,
            -layout.tokens_per_second,
            layout.memory_gib,
        ),
    )


def _candidates(base: Parallel, is_fixed: bool) -> Iterator[tuple[Parallel, Recompute]]:
    """Variations of `base`; `is_fixed` keeps its ZeRO stage and sequence parallelism."""
    stages = [0, 1, 2, 3]
    if is_fixed or base.engine is EngineKind.megatron:
        stages = [base.zero_stage]
    for tensor, context, stage, recompute in product((1, 2, 4, 8), (1, 2, 4, 8), stages, Recompute):
        if is_fixed:
            sequence_parallel = [base.sequence_parallel and tensor > 1]
        else:
            sequence_parallel = [False, True] if tensor > 1 else [False]
        multiples = (1, 2, 4) if stage > 1 and not is_fixed else (1,)
        for sequence, multiple in product(sequence_parallel, multiples):
            parallel = replace(
                base,
                tensor_parallel=tensor,
                sequence_parallel=sequence,
                context_parallel=context,
                zero_stage=stage,
                micro_batch_tokens=multiple * base.micro_batch_tokens,
            )
            yield parallel, recompute


def evaluate_layout(
    run: PlannedRun, parallel: Parallel, recompute: Recompute, ranks: int, gpu: Gpu
) -> Layout:
    """Memory and throughput of a layout, or why it cannot run.

    A layout that only lacks memory has a throughput.
    """
    p = parallel
    layout = Layout(
        p.tensor_parallel,
        p.sequence_parallel,
        p.context_parallel,
        p.zero_stage,
        recompute.value,
        p.micro_batch_tokens,
    )
    if ranks % (p.tensor_parallel * p.context_parallel):
        reason = f"{p.tensor_parallel} x {p.context_parallel} does not divide {ranks} ranks"
        return replace(layout, lacks="ranks", unsupported_reason=reason)
    groups = ranks // (p.tensor_parallel * p.context_parallel)
    if run.schedule.batch_end_sequences < groups:
        reason = (
            f"the full batch has {run.schedule.batch_end_sequences} sequences for {groups} groups "
            "of ranks"
        )
        return replace(layout, lacks="sequences", unsupported_reason=reason)
    try:
        compute = replace(run.compute, recompute=recompute)
        config = replace(run, parallel=parallel, compute=compute)
    except ValueError as error:
        return replace(layout, lacks="valid sizes", unsupported_reason=str(error))
    times = phase_times(config, ranks, gpu)
    total = sum(phase.steps * time.total for phase, time in times)
    overlapped = total - sum(phase.steps * time.overlappable for phase, time in times)
    required = estimate_memory(config, ranks).total / GIB
    layout = replace(
        layout,
        memory_gib=required,
        tokens_per_second=run.tokens / ranks / total,
        tokens_per_second_hidden=run.tokens / ranks / overlapped,
    )
    available = run.cluster.memory_gib or gpu.memory_gib
    reserved = headroom_bytes(run, run.cluster.device.value) / GIB
    if required > available - reserved:
        reason = f"needs {required:.1f} of {available:g} GiB"
        reason += f" less {reserved:g} of headroom" if reserved else ""
        return replace(layout, lacks="memory", unsupported_reason=reason)
    return layout


def select_layouts(
    layouts: list[Layout], configured: Layout, fastest: int
) -> list[tuple[int | None, Layout]]:
    """Layouts to print, each with its position by speed, or None if it cannot run.

    They are the `fastest` layouts, the configured layout, and the first of each kind of failure.
    Lack of memory counts as one kind per recompute mode.
    """
    runnable = [layout for layout in layouts if layout.unsupported_reason is None]
    rows: list[tuple[int | None, Layout]] = list(enumerate(runnable[:fastest], 1))
    failing: dict[tuple[str, str], Layout] = {}
    for layout in [configured, *layouts]:
        if layout.lacks is not None:
            kind = (layout.lacks, layout.recompute if layout.lacks == "memory" else "")
            failing.setdefault(kind, layout)
    if configured.unsupported_reason is None and configured not in runnable[:fastest]:
        faster = sum(layout.tokens_per_second > configured.tokens_per_second for layout in runnable)
        rows.append((faster + 1, configured))
    return rows + [(None, layout) for layout in failing.values()]


def nearest_layout(run: PlannedRun, ranks: int, gpu: Gpu, requested: Parallel) -> Layout | None:
    """The layout that runs and differs least from `requested`; None if no layout runs."""
    kinds = list(Recompute)

    def distance(layout: Layout) -> tuple[float, float]:
        steps = abs(math.log2(layout.tensor_parallel / requested.tensor_parallel))
        steps += abs(math.log2(layout.context_parallel / requested.context_parallel))
        steps += abs(
            kinds.index(Recompute(layout.recompute)) - kinds.index(run.compute.recompute)
        ) / len(kinds)
        return steps, -layout.tokens_per_second

    runnable = [
        layout
        for layout in enumerate_layouts(run, ranks, gpu, requested)
        if layout.unsupported_reason is None
    ]
    return min(runnable, key=distance, default=None)
