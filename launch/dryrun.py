"""Simulate one step of a run at full size on a laptop's CPU.

Builds model, layout and engine on fake tensors in a fake process group of `dryrun.world_size`
ranks and takes one step. Shows what a rank holds, and the bytes of every collective beside the
formula of train/costs/traffic.py. Refuses a layout that cannot run and names the nearest that can.
Also written to RUN/dryrun.json.

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

from rich.table import Table

from core.command import command
from core.console import table_console
from core.errors import InputError
from core.files import make_folder, write_json
from launch.planning.dryrun_config import DryRunConfig
from launch.planning.estimate import planned_gpu
from launch.planning.layouts import evaluate_layout
from train.config import EngineKind
from train.costs.memory import GIB, estimate_memory
from train.costs.traffic import RING_FACTORS, step_traffic, sum_by_collective
from train.engines.partition import Bucket, FlatGroup, flat_groups, megatron_buckets

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from launch.simulation.dry_run import DryRunResult


@command(DryRunConfig)
def main(run: DryRunConfig) -> None:
    """Simulate a step, print the tables and write dryrun.json; refuse a layout that cannot run."""
    layout = evaluate_layout(run, run.parallel, run.compute.recompute, run.ranks, planned_gpu(run))
    if layout.unsupported_reason is not None:
        p = run.parallel
        shape = (
            f"TP {p.tensor_parallel}, CP {p.context_parallel}, recompute "
            f"{run.compute.recompute.value}"
        )
        raise InputError(
            f"{shape} on {run.ranks} ranks: {layout.unsupported_reason}{run.suggestion()}"
        )
    logger.info("loading torch, DeepSpeed and megatron-core")
    from launch.simulation.dry_run import dry_run

    simulated = dry_run(run, run.ranks)
    result = {
        "run": run.run.name,
        "ranks": run.ranks,
        "tensor_parallel": run.parallel.tensor_parallel,
        "context_parallel": run.parallel.context_parallel,
        "replicas": run.ranks // run.parallel.tensor_parallel,
        "memory_gib_of_a_rank": layout.memory_gib,
        "shards": shard_sizes(run, simulated),
        "step": {
            **asdict(simulated.step_schedule),
            "sequences_of_the_rank": sum(simulated.micro_batches),
            "micro_batches_of_the_rank": len(simulated.micro_batches),
        },
        "collectives": compare_collectives(run, simulated),
    }
    show(run, result)
    path = run.run.files.dryrun
    make_folder(path.parent)
    write_json(path, result)
    logger.info(f"wrote {path}")


def shard_sizes(run: DryRunConfig, simulated: "DryRunResult") -> dict[str, Any]:
    """Elements per rank: optimizer state is sharded, from stage 2 gradients, in stage 3 weights.

    DeepSpeed shards each optimizer group, in stage 3 each parameter; megatron-core each bucket.
    """
    is_megatron = run.parallel.engine is EngineKind.megatron
    stage = run.parallel.zero_stage
    groups: Sequence[FlatGroup | Bucket] = (
        megatron_buckets(run, run.ranks) if is_megatron else flat_groups(run, run.ranks)
    )
    replicas = groups[0].replicas
    owned = [sum(group.shard_numel(replica) for group in groups) for replica in range(replicas)]
    full = sum(owned)
    shard = sum(group.padded_shard_numel for group in groups)
    memory = estimate_memory(run, run.ranks)
    return {
        "weights": full,
        "weights_of_a_rank": shard if stage == 3 else full,
        "gradients_of_a_rank": shard if stage > 1 else full,
        "optimizer_part": shard,
        "optimizer_padding": shard * replicas - full,
        "optimizer_least": min(owned),
        "optimizer_most": max(owned),
        "largest_imbalance": max(owned) / (full / replicas) - 1,
        "rank": simulated.rank,
        "optimizer_of_the_rank": {"engine": simulated.optimizer_elements, "formula": owned[-1]},
        "bytes": asdict(memory) | {"total": memory.total},
    }


def compare_collectives(run: DryRunConfig, simulated: "DryRunResult") -> list[dict[str, Any]]:
    """Counted bytes of each kind of collective, and the formula's for those of the step."""
    expected = step_traffic(
        run,
        run.ranks,
        sum(simulated.micro_batches),
        len(simulated.micro_batches),
        simulated.step_schedule.seq_len,
    )
    group_sizes = {payload.group: payload.group_size for payload in expected}
    rows = []
    for when, counts, formula in (
        ("start", simulated.start, {}),
        ("step", simulated.step, sum_by_collective(expected)),
    ):
        for key in [*counts, *(key for key in formula if key not in counts)]:
            group, operation = key
            count = counts.get(key)
            size = count.size if count else 0
            ranks = count.ranks if count else group_sizes[group]
            is_known = operation in RING_FACTORS
            rows.append(
                {
                    "when": when,
                    "group": group,
                    "ranks": ranks,
                    "operation": operation,
                    "calls": count.calls if count else 0,
                    "bytes": size,
                    "formula": formula.get(key, 0.0) if formula else None,
                    "sent_by_a_rank": RING_FACTORS[operation] * (ranks - 1) / ranks * size
                    if is_known
                    else None,
                }
            )
    return rows


def show(run: DryRunConfig, result: dict[str, Any]) -> None:
    """Print what a rank holds and sends."""
    console = table_console()
    data_parallel = result["ranks"] // result["tensor_parallel"] // result["context_parallel"]
    table = memory_table(result["shards"])
    table.title = (
        f"{result['run']} on {result['ranks']} ranks: TP {result['tensor_parallel']}, CP "
        f"{result['context_parallel']}, DP {data_parallel}"
    )
    console.print(table)
    console.print(collectives_table(run, result))


def collectives_table(run: DryRunConfig, result: dict[str, Any]) -> Table:
    """Every kind of collective, its counted bytes and the formula's."""
    columns = ("when", "group", "ranks", "operation", "calls", "bytes counted", "bytes by formula")
    table = Table(*columns, "GB sent per rank")
    step = result["step"]
    table.title = (
        f"collectives of rank {result['shards']['rank']} in a step of {step['batch']:,} x "
        f"{step['seq_len']:,} tokens, {step['micro_batches_of_the_rank']:,} micro-batches"
    )
    for row in result["collectives"]:
        formula = "" if row["formula"] is None else f"{row['formula']:,.0f}"
        is_bound = run.parallel.zero_stage == 3 and row["operation"] == "all_gather"
        if is_bound and formula and row["bytes"] <= row["formula"]:
            formula = f"at most {formula}"
        elif formula and row["bytes"] != row["formula"]:
            formula += " differs"
        table.add_row(
            row["when"],
            row["group"],
            str(row["ranks"]),
            row["operation"],
            f"{row['calls']:,}",
            f"{row['bytes']:,}",
            formula,
            "" if row["sent_by_a_rank"] is None else f"{row['sent_by_a_rank'] / 1e9:.3f}",
        )
    return table


def memory_table(shards: dict[str, Any]) -> Table:
    """What a rank holds."""
    table = Table("per rank", "elements", "GiB")
    sizes = shards["bytes"]
    for name, key in (("weights", "parameters"), ("gradients", "gradients")):
        table.add_row(name, f"{shards[f'{name}_of_a_rank']:,}", f"{sizes[key] / GIB:.2f}")
    spread = f"{shards['optimizer_least']:,} to {shards['optimizer_most']:,}"
    table.add_row(
        "optimizer shard: fp32 weights, two moments", spread, f"{sizes['optimizer'] / GIB:.2f}"
    )
    table.add_row("largest shard over the mean", f"{shards['largest_imbalance']:+.2e}", "")
    table.add_row("padding of all shards", f"{shards['optimizer_padding']:,}", "")
    shard = shards["optimizer_of_the_rank"]
    agreement = "equal to the formula"
    if shard["engine"] != shard["formula"]:
        agreement = f"{shard['formula']:,} by formula: differs"
    table.add_row(
        f"shard of rank {shards['rank']}, from the engine", f"{shard['engine']:,}, {agreement}", ""
    )
    table.add_row("activations of one micro-batch", "", f"{sizes['activations'] / GIB:.2f}")
    table.add_row("buffers", "", f"{sizes['buffers'] / GIB:.2f}")
    table.add_row("total", "", f"{sizes['total'] / GIB:.2f}")
    return table


if __name__ == "__main__":
    main()
