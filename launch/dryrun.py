"""A run at full size without its machines, on a laptop's CPU.

Builds the model, its cut and the engine's partition on tensors without memory in a process group
that pretends to have `dryrun.world_size` ranks, takes one step, and shows what each rank holds,
and every collective with its bytes beside the formula of train/costs/traffic.py. A layout that
cannot run is refused with the nearest one that can. Also written to RUN/dryrun.json.

examples:
  python launch/dryrun.py +experiment=7b dryrun.world_size=256
  python launch/dryrun.py +experiment=7b dryrun.world_size=256 parallel.tensor_parallel=8 \\
    parallel.sequence_parallel=true
  python launch/dryrun.py +experiment=7b dryrun.world_size=256 model.n_layer=4 \\
    parallel.engine=deepspeed parallel.zero_stage=3
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from rich.console import Console
from rich.table import Table

from core.command import command
from core.errors import InputError
from core.files import write_json
from launch.planning.estimate import planned_gpu
from launch.planning.layouts import layout_of
from launch.planning.trial import DryRun
from train.config import EngineKind
from train.costs.memory import GIB, estimate_memory
from train.costs.traffic import RING_FACTORS, step_traffic, sum_by_collective
from train.engines.partition import Bucket, FlatGroup, flat_groups, megatron_buckets

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from launch.simulation.dry_run import DryRunResult


@command(DryRun)
def main(run: DryRun) -> None:
    """Refuse what cannot run; else try it, print, and write down."""
    layout = layout_of(run, run.parallel, run.compute.recompute, run.ranks, planned_gpu(run))
    if layout.unsupported_reason is not None:
        p = run.parallel
        shape = (
            f"tensor {p.tensor_parallel} x context {p.context_parallel}, recompute "
            f"{run.compute.recompute.value}"
        )
        raise InputError(
            f"{shape} on {run.ranks} ranks: {layout.unsupported_reason}{run.way_out()}"
        )
    logger.info("loading torch, DeepSpeed and megatron-core")
    from launch.simulation.dry_run import dry_run

    seen = dry_run(run, run.ranks)
    result = {
        "run": run.run.name,
        "ranks": run.ranks,
        "tensor_parallel": run.parallel.tensor_parallel,
        "context_parallel": run.parallel.context_parallel,
        "replicas": run.ranks // run.parallel.tensor_parallel,
        "memory_gib_of_a_rank": layout.memory_gib,
        "shards": shards(run, seen),
        "step": {**asdict(seen.step_schedule), "sequences_of_the_rank": sum(seen.micro_batches)}
        | {"micro_batches_of_the_rank": len(seen.micro_batches)},
        "collectives": collectives(run, seen),
    }
    show(run, result)
    path = run.run.files.dryrun
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    logger.info(f"written to {path}")


def shards(run: DryRun, seen: "DryRunResult") -> dict[str, Any]:
    """Elements that ranks hold: of the optimizer a part, from stage 2 on of gradients too, in stage
    3 of weights.

    DeepSpeed cuts each of the optimizer's groups once, in stage 3 every parameter, megatron-core
    every bucket.
    """
    megatron, stage = run.parallel.engine is EngineKind.megatron, run.parallel.zero_stage
    cuts: Sequence[FlatGroup | Bucket] = (
        megatron_buckets(run, run.ranks) if megatron else flat_groups(run, run.ranks)
    )
    replicas = cuts[0].replicas
    owned = [sum(cut.shard_numel(replica) for cut in cuts) for replica in range(replicas)]
    need = estimate_memory(run, run.ranks)
    whole, part = sum(owned), sum(cut.padded_shard_numel for cut in cuts)
    return {
        "weights": whole,
        "weights_of_a_rank": part if stage == 3 else whole,
        "gradients_of_a_rank": part if stage > 1 else whole,
        "optimizer_part": part,
        "optimizer_padding": part * replicas - whole,
        "optimizer_least": min(owned),
        "optimizer_most": max(owned),
        "largest_imbalance": max(owned) / (sum(owned) / replicas) - 1,
        "rank": seen.rank,
        "optimizer_of_the_rank": {"engine": seen.owned, "formula": owned[-1]},
        "bytes": asdict(need) | {"total": need.total},
    }


def collectives(run: DryRun, seen: "DryRunResult") -> list[dict[str, Any]]:
    """Each kind of collective as counted, beside the formula."""
    expected = step_traffic(
        run, run.ranks, sum(seen.micro_batches), len(seen.micro_batches), seen.step_schedule.seq_len
    )
    sizes, members = (
        sum_by_collective(expected),
        {payload.group: payload.group_size for payload in expected},
    )
    rows = []
    for when, counts, formula in (("start", seen.start, {}), ("step", seen.step, sizes)):
        for key in [*counts, *(key for key in formula if key not in counts)]:
            group, operation = key
            counted = counts.get(key)
            calls, size, n = (
                (counted.calls, counted.size, counted.ranks) if counted else (0, 0, members[group])
            )
            sent = (
                RING_FACTORS[operation] * (n - 1) / n * size if operation in RING_FACTORS else None
            )
            rows.append(
                {
                    "when": when,
                    "group": group,
                    "ranks": n,
                    "operation": operation,
                    "calls": calls,
                    "bytes": size,
                }
                | {"formula": formula.get(key, 0.0) if formula else None, "sent_by_a_rank": sent}
            )
    return rows


def show(run: DryRun, result: dict[str, Any]) -> None:
    """What a rank holds, and what it sends."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    shape = f"tensor {result['tensor_parallel']} x context {result['context_parallel']}"
    title = f"{result['run']} on {result['ranks']} ranks: {shape} x data "
    title += str(result["ranks"] // result["tensor_parallel"] // result["context_parallel"])
    shown = held(result["shards"])
    shown.title = title
    console.print(shown)
    grid = Table(
        "when",
        "group",
        "ranks",
        "operation",
        "calls",
        "bytes counted",
        "bytes by formula",
        "GB sent by a rank",
    )
    step = result["step"]
    grid.title = (
        f"collectives of rank {result['shards']['rank']}, in a step of {step['batch']:,} x "
        f"{step['seq_len']:,}"
    )
    grid.title += f" tokens: {step['micro_batches_of_the_rank']:,} micro-batches"
    for row in result["collectives"]:
        sent = "" if row["sent_by_a_rank"] is None else f"{row['sent_by_a_rank'] / 1e9:.3f}"
        formula = "" if row["formula"] is None else f"{row['formula']:,.0f}"
        bound = run.parallel.zero_stage == 3 and row["operation"] == "all_gather"
        if bound and formula and row["bytes"] <= row["formula"]:
            formula = f"at most {formula}"
        elif formula and row["bytes"] != row["formula"]:
            formula += " differs"
        cells = (
            row["when"],
            row["group"],
            str(row["ranks"]),
            row["operation"],
            f"{row['calls']:,}",
        )
        grid.add_row(*cells, f"{row['bytes']:,}", formula, sent)
    console.print(grid)


def held(shards: dict[str, Any]) -> Table:
    """What a rank holds."""
    grid = Table("a rank holds", "elements", "GiB")
    sizes, mine = shards["bytes"], shards["optimizer_of_the_rank"]
    grid.add_row("weights", f"{shards['weights_of_a_rank']:,}", f"{sizes['parameters'] / GIB:.2f}")
    grid.add_row(
        "gradients", f"{shards['gradients_of_a_rank']:,}", f"{sizes['gradients'] / GIB:.2f}"
    )
    spread = f"{shards['optimizer_least']:,} to {shards['optimizer_most']:,}"
    grid.add_row(
        "optimizer's part: fp32 weights, two moments", spread, f"{sizes['optimizer'] / GIB:.2f}"
    )
    grid.add_row("largest part over the mean", f"{shards['largest_imbalance']:+.2e}", "")
    grid.add_row("padding of all parts", f"{shards['optimizer_padding']:,}", "")
    same = (
        "as by formula" if mine["engine"] == mine["formula"] else f"{mine['formula']:,} by formula"
    )
    grid.add_row(
        f"rank {shards['rank']}'s part, read from the engine", f"{mine['engine']:,}, {same}", ""
    )
    grid.add_row("activations, of one micro-batch", "", f"{sizes['activations'] / GIB:.2f}")
    grid.add_row("buffers", "", f"{sizes['buffers'] / GIB:.2f}")
    grid.add_row("together", "", f"{sizes['total'] / GIB:.2f}")
    return grid


if __name__ == "__main__":
    main()
