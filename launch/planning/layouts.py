"""Layouts that could run a config: needs and rates, or why one cannot run. Pure arithmetic."""

import math
from dataclasses import dataclass, replace
from itertools import product

from launch.planning.devices import Gpu
from launch.planning.estimate import PlannedRun, timed
from model.config import Recompute
from train.config import EngineKind, Parallel
from train.costs.memory import GIB, estimate_memory, headroom_bytes


@dataclass
class Layout:
    """One layout of the run; rates are per rank, over the whole run, 0 where none can be given."""

    tensor_parallel: int
    sequence_parallel: bool
    context_parallel: int
    zero_stage: int
    recompute: str
    micro_batch_tokens: int
    memory_gib: float = 0.0
    tokens_per_second: float = 0.0  # if no communication hides
    tokens_per_second_hidden: float = 0.0  # if all does that may (launch/planning/estimate.py)
    lacks: str | None = None  # ranks, sequences, a cut or memory
    unsupported_reason: str | None = None


def layouts(run: PlannedRun, ranks: int, gpu: Gpu, asked: Parallel | None = None) -> list[Layout]:
    """Every layout of tensor, sequence, context, ZeRO stage and recompute: the fastest that fits
    first, then others.

    With `asked`, stage and sequence parallelism are as asked for. Precision and engine are the
    run's. Larger micro-batches are tried in stages 2 and 3, which send in every one; to others they
    only cost memory.
    """
    found = []
    base = asked or run.parallel
    stages = [base.zero_stage] if asked or base.engine is EngineKind.megatron else [0, 1, 2, 3]
    for tensor, context, stage, recompute in product((1, 2, 4, 8), (1, 2, 4, 8), stages, Recompute):
        cuts = (
            [base.sequence_parallel and tensor > 1] if asked else [False, True][: 1 + (tensor > 1)]
        )
        for sequence, times in product(cuts, (1, 2, 4) if stage > 1 and not asked else (1,)):
            parallel = replace(
                base,
                tensor_parallel=tensor,
                sequence_parallel=sequence,
                context_parallel=context,
                zero_stage=stage,
                micro_batch_tokens=times * base.micro_batch_tokens,
            )
            found.append(layout_of(run, parallel, recompute, ranks, gpu))
    return sorted(
        found,
        key=lambda layout: (
            layout.unsupported_reason is not None,
            -layout.tokens_per_second,
            layout.memory_gib,
        ),
    )


def layout_of(
    run: PlannedRun, parallel: Parallel, recompute: Recompute, ranks: int, gpu: Gpu
) -> Layout:
    """Needs and rates of a layout, or why it cannot run; one that only lacks memory has rates."""
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
        why = f"{p.tensor_parallel} x {p.context_parallel} does not divide {ranks} ranks"
        return replace(layout, lacks="ranks", unsupported_reason=why)
    if run.schedule.batch_end_sequences < (
        groups := ranks // (p.tensor_parallel * p.context_parallel)
    ):
        why = (
            f"the full batch of {run.schedule.batch_end_sequences} sequences leaves some of "
            f"{groups} groups without one"
        )
        return replace(layout, lacks="sequences", unsupported_reason=why)
    try:
        compute = replace(run.compute, recompute=recompute)
        other = replace(run, parallel=parallel, compute=compute)
    except ValueError as error:
        return replace(layout, lacks="a cut", unsupported_reason=str(error))
    seconds = timed(other, ranks, gpu)
    total = sum(phase.steps * time.total for phase, time in seconds)
    hidden = total - sum(phase.steps * time.may_hide for phase, time in seconds)
    memory = estimate_memory(other, ranks).total / GIB
    layout = replace(
        layout,
        memory_gib=memory,
        tokens_per_second=run.tokens / ranks / total,
        tokens_per_second_hidden=run.tokens / ranks / hidden,
    )
    whole, kept = (
        run.cluster.memory_gib or gpu.memory_gib,
        headroom_bytes(run, run.cluster.device.value) / GIB,
    )
    if memory > whole - kept:
        why = f"needs {memory:.1f} of {whole:g} GiB" + (
            f" less {kept:g} of headroom" if kept else ""
        )
        return replace(layout, lacks="memory", unsupported_reason=why)
    return layout


def worth_showing(
    found: list[Layout], own: Layout, fastest: int
) -> list[tuple[int | None, Layout]]:
    """The fastest, the run's own, and of each kind of failure the first, each with its place among
    those that run.

    Lack of memory is one kind for each kind of recompute, the fastest of which comes first.
    """
    runs = [layout for layout in found if layout.unsupported_reason is None]
    rows: list[tuple[int | None, Layout]] = list(enumerate(runs[:fastest], 1))
    failing: dict[tuple[str, str], Layout] = {}
    for layout in [own, *found]:
        if layout.lacks is not None:
            failing.setdefault(
                (layout.lacks, layout.recompute if layout.lacks == "memory" else ""), layout
            )
    if own.unsupported_reason is None and own not in runs[:fastest]:
        faster = sum(layout.tokens_per_second > own.tokens_per_second for layout in runs)
        rows.append((faster + 1, own))
    return rows + [(None, layout) for layout in failing.values()]


def nearest(run: PlannedRun, ranks: int, gpu: Gpu, asked: Parallel) -> Layout | None:
    """The layout that works and changes least of what was asked for; None when there is none."""
    kinds = list(Recompute)

    def distance(layout: Layout) -> tuple[float, float]:
        steps = abs(math.log2(layout.tensor_parallel / asked.tensor_parallel))
        steps += abs(math.log2(layout.context_parallel / asked.context_parallel))
        steps += abs(
            kinds.index(Recompute(layout.recompute)) - kinds.index(run.compute.recompute)
        ) / len(kinds)
        return steps, -layout.tokens_per_second

    works = [
        layout for layout in layouts(run, ranks, gpu, asked) if layout.unsupported_reason is None
    ]
    return min(works, key=distance, default=None)
