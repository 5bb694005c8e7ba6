"""What a run needs, before anything is allocated.

Memory of a rank, time and cost at a utilisation, the roofline of several GPUs, communication, checkpoints and faults,
tokens and epochs per source, and the layouts that fit. Also written to RUN/plan.json.

examples:
  python launch/plan.py +experiment=7b cluster=h100_32n
  python launch/plan.py +experiment=1b cluster.nodes=1 cluster.ranks_per_node=8
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from data.command import command
from launch.devices import GPUS, Gpu
from launch.estimate import (
    PlannedRun,
    layouts,
    planned_gpu,
    reliability,
    roofline_seconds,
    step_seconds,
    traffic_between_ranks,
)
from model.flops import parameter_count, train_flops_per_token, train_traffic
from train.plan import GIB, needs
from train.schedule import Schedule

SHOWN = 12  # layouts


def plan(run: PlannedRun) -> dict[str, Any]:
    """Everything of a plan as plain values: seconds, bytes, tokens, days, dollars."""
    ranks = run.cluster.nodes * run.cluster.ranks_per_node
    gpu = planned_gpu(run)
    need, traffic = needs(run, ranks), train_traffic(run.model)
    computing, communicating = step_seconds(run, ranks, gpu)
    tokens_per_step = run.schedule.batch_end * max(stage.seq_len for stage in run.data.stages)
    days = run.tokens / tokens_per_step * computing / 86400
    return {
        "run": run.run.name,
        "ranks": ranks,
        "parameters": parameter_count(run.model),
        "tokens": run.tokens,
        "flops_per_token": train_flops_per_token(run.model),
        "bytes_per_token": asdict(traffic),
        "memory_of_a_rank": asdict(need) | {"total": need.total},
        "gpu": gpu.name,
        "mfu": run.plan.mfu,
        "days": days,
        "gpu_hours": 24 * days * ranks,
        "dollars": 24 * days * ranks * run.plan.price_per_gpu_hour,
        "step": {"computing_seconds": computing, "communication_seconds": communicating}
        | {"bytes_sent_by_a_rank": traffic_between_ranks(run, ranks)},
        "reliability": asdict(reliability(run, ranks, days)),
        "roofline_tokens_per_second": {other.name: 1 / roofline_seconds(run, other) for other in GPUS},
        "sources": sources(run),
        "layouts": [asdict(layout) for layout in layouts(run, ranks, gpu)],
    }


def sources(run: PlannedRun) -> dict[str, dict[str, float | None]]:
    """Tokens of each source over the run, and its epochs where the config says how many tokens it has."""
    read = dict.fromkeys(run.data.sources, 0.0)
    for stage in run.data.stages:
        total = sum(stage.mixture.values())
        for name, share in stage.mixture.items():
            read[name] += run.data.tokens_of(stage) * share / total
    has = {name: source.expected_tokens for name, source in run.data.sources.items()}
    return {n: {"tokens": read[n], "epochs": read[n] / size if (size := has[n]) else None} for n in read}


@command(PlannedRun)
def main(run: PlannedRun) -> None:
    """Print the plan, and write it beside the run."""
    result, console = plan(run), Console()
    console.print(summary(run, result))
    console.print(stages(run))
    console.print(fed(result))
    console.print(machines(run, result))
    console.print(choices(result))
    path = run.run.folder / "plan.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {path}", soft_wrap=True)


def summary(run: PlannedRun, result: dict[str, Any]) -> Table:
    """Size, memory, time, communication and saving."""
    rows = Table(title=f"{result['run']} on {result['ranks']} ranks ({result['gpu']})", show_header=False)
    rows.add_row("parameters", f"{result['parameters']:,}")
    rows.add_row("tokens", f"{result['tokens']:,}")
    rows.add_row("training FLOPs per token", f"{result['flops_per_token']:.4g}")
    rows.add_row("training FLOPs", f"{result['flops_per_token'] * result['tokens']:.3g}")
    for name, size in result["memory_of_a_rank"].items():
        rows.add_row(f"memory of a rank, {name}", f"{size / GIB:.1f} GiB")
    if run.cluster.memory_gib is not None:
        rows.add_row("memory of a rank, present", f"{run.cluster.memory_gib:.0f} GiB")
    days, step, saving = result["days"], result["step"], result["reliability"]
    again = f", recompute {run.parallel.recompute.value}"
    rows.add_row(f"days at {result['mfu']:.0%} MFU{again}", f"{days:.1f} ({result['gpu_hours']:,.0f} GPU hours)")
    rows.add_row("cost", f"{result['dollars']:,.0f} dollars at {run.plan.price_per_gpu_hour} an hour")
    sent = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in step["bytes_sent_by_a_rank"].items() if size)
    rows.add_row("step of the full batch", f"{step['computing_seconds']:.2f} s computing")
    rows.add_row("a rank sends, 1e9 bytes a step", sent or "nothing")
    share = step["communication_seconds"] / (step["computing_seconds"] + step["communication_seconds"])
    rows.add_row("communication", f"{step['communication_seconds']:.2f} s, {share:.1%} if nothing overlaps")
    rows.add_row(
        "checkpoint", f"{saving['checkpoint_bytes'] / GIB:.1f} GiB, written in {saving['writing_seconds']:.0f} s"
    )
    rows.add_row("expected faults", f"{saving['failures']:.1f}")
    rows.add_row("best pause between saves", f"{saving['interval_minutes']:.1f} minutes")
    return rows


def stages(run: PlannedRun) -> Table:
    """Where each stage begins, and what its first step does."""
    schedule = Schedule(run)
    grid = Table("stage", "from token", "context", "batch", "lr")
    begin = 0
    for end, seq_len, name in schedule.edges:
        now = schedule.at(begin)
        grid.add_row(name, f"{begin:,}", f"{seq_len:,}", f"{now.batch:,}", f"{now.lr:.3g}")
        begin = end
    return grid


def fed(result: dict[str, Any]) -> Table:
    """Tokens and epochs of each source."""
    grid = Table("source", "tokens", "epochs")
    for name, row in result["sources"].items():
        epochs = "not known" if row["epochs"] is None else f"{row['epochs']:.2f}"
        grid.add_row(name, f"{row['tokens']:,.0f}", epochs)
    return grid


def machines(run: PlannedRun, result: dict[str, Any]) -> Table:
    """The roofline on several GPUs, with what is computed again: an upper bound, at datasheet rates."""
    grid = Table("GPU", "roofline, tokens/s", "MFU there", f"days at {run.plan.mfu:.0%} MFU, recompute none")
    for gpu in GPUS:
        rate = result["roofline_tokens_per_second"][gpu.name]
        days = _days(run, result["ranks"], gpu)
        grid.add_row(gpu.name, f"{rate:,.0f}", f"{rate * result['flops_per_token'] / gpu.flops:.0%}", f"{days:.1f}")
    return grid


def _days(run: PlannedRun, ranks: int, gpu: Gpu) -> float:
    return train_flops_per_token(run.model) * run.tokens / (ranks * gpu.flops * run.plan.mfu) / 86400


def choices(result: dict[str, Any]) -> Table:
    """Layouts, the fastest that fits first, and why others fall."""
    grid = Table("tensor", "sequence", "context", "ZeRO", "recompute", "GiB", "tokens/s a rank", "")
    for row in result["layouts"][:SHOWN]:
        rate = f"{row['tokens_per_second']:,.0f}" if row["why_not"] is None else ""
        memory = f"{row['memory_gib']:.0f}" if row["memory_gib"] else ""
        cut = "cut" if row["sequence_parallel"] else ""
        cells = (
            str(row["tensor_parallel"]),
            cut,
            str(row["context_parallel"]),
            str(row["zero_stage"]),
            row["recompute"],
        )
        grid.add_row(*cells, memory, rate, row["why_not"] or "")
    return grid


if __name__ == "__main__":
    main()
