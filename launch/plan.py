"""What a run needs, before anything is allocated.

Memory of a rank, days and GPU hours at a utilisation, the roofline of several GPUs,
communication, checkpoints and faults, each stage's steps, and the layouts that fit. Also
written to RUN/plan.json.

examples:
  python launch/plan.py +experiment=7b cluster=h100_32n
  python launch/plan.py +experiment=1b cluster.nodes=1 cluster.ranks_per_node=8
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from rich.console import Console
from rich.table import Table

from core.command import command
from core.files import write_json
from launch.planning.devices import GPUS
from launch.planning.estimate import (
    PlannedRun,
    planned_gpu,
    reliability,
    roofline_seconds,
    timed,
    traffic_between_ranks,
)
from launch.planning.layouts import layout_of, layouts, worth_showing
from model.flops import parameter_count, train_flops_per_token, train_memory_traffic
from train.costs.memory import GIB, estimate_memory, headroom_bytes
from train.schedule import Schedule

SHOWN = 12  # layouts


def plan(run: PlannedRun) -> dict[str, Any]:
    """Everything of a plan as plain values: seconds, bytes, tokens, days."""
    ranks = run.cluster.nodes * run.cluster.ranks_per_node
    gpu = planned_gpu(run)
    need, traffic = estimate_memory(run, ranks), train_memory_traffic(run.model)
    seconds = timed(run, ranks, gpu)
    days = {
        part: sum(phase.steps * getattr(time, part) for phase, time in seconds) / 86400
        for part in ("computing", "may_hide", "exposed", "total")
    }
    found, own = (
        layouts(run, ranks, gpu),
        layout_of(run, run.parallel, run.compute.recompute, ranks, gpu),
    )
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
        "gpu_hours": 24 * days["total"] * ranks,
        "tokens_per_second": own.tokens_per_second,
        "phases": [
            asdict(phase)
            | {
                "step_seconds": asdict(time) | {"total": time.total},
                "days": phase.steps * time.total / 86400,
            }
            | {
                "bytes_sent_by_a_rank": traffic_between_ranks(
                    run, ranks, phase.batch, phase.seq_len
                )
            }
            for phase, time in seconds
        ],
        "reliability": asdict(reliability(run, ranks, days["total"])),
        "roofline_tokens_per_second": {
            other.name: 1 / roofline_seconds(run, other) for other in GPUS
        },
        "stages": stages(run, ranks),
        "layout": asdict(own),
        "layouts": [asdict(layout) for layout in found],
        "layouts_shown": [
            (place, asdict(layout)) for place, layout in worth_showing(found, own, SHOWN)
        ],
    }


def stages(run: PlannedRun, ranks: int) -> list[dict[str, Any]]:
    """First step of each stage and of the full batch, with sequences per group of ranks."""
    schedule = Schedule(run.schedule, run.optim.lr, run.data)
    groups = ranks // (run.parallel.tensor_parallel * run.parallel.context_parallel)
    begins = [0, *(end for end, _, _ in schedule.stages[:-1])]
    rows = []
    for token in sorted({*begins, min(run.schedule.ramp_tokens, schedule.total - 1)}):
        now = schedule.at(token)
        most = -(-now.batch // groups)
        rows.append(
            asdict(now)
            | {
                "token": token,
                "least_sequences": now.batch // groups,
                "most_sequences": most,
                "micro_batches": -(-most // (run.parallel.micro_batch_tokens // now.seq_len)),
                "groups_without": max(0, groups - now.batch),
            }
        )
    return rows


@command(PlannedRun)
def main(run: PlannedRun) -> None:
    """Print the plan, and write it beside the run."""
    result, console = plan(run), Console(width=None if sys.stdout.isatty() else 120)
    console.print(summary(run, result))
    console.print(first_steps(result))
    console.print(times(result))
    console.print(machines(run, result))
    console.print(choices(result))
    path = run.run.files.plan
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    console.print(f"written to {path}", soft_wrap=True)


def summary(run: PlannedRun, result: dict[str, Any]) -> Table:
    """Size, memory, time, communication and saving."""
    rows = Table(
        title=f"{result['run']} on {result['ranks']} ranks ({result['gpu']})", show_header=False
    )
    rows.add_row("parameters", f"{result['parameters']:,}")
    rows.add_row("tokens", f"{result['tokens']:,}")
    rows.add_row("training FLOPs per token", f"{result['flops_per_token']:.4g}")
    rows.add_row("training FLOPs", f"{result['flops_per_token'] * result['tokens']:.3g}")
    for name, size in result["memory_of_a_rank"].items():
        rows.add_row(f"memory of a rank, {name}", f"{size / GIB:.1f} GiB")
    if run.cluster.memory_gib is not None:
        kept = headroom_bytes(run, run.cluster.device.value) / GIB
        rows.add_row(
            "memory of a rank, present",
            f"{run.cluster.memory_gib:g} GiB, of which {kept:g} are kept free",
        )
    days, saving = result["days"], result["reliability"]
    at = f"{result['mfu']:.0%} MFU, recompute {run.compute.recompute.value}"
    rows.add_row(
        f"days at {at}",
        f"{days['total']:.1f} ({result['gpu_hours']:,.0f} GPU hours), if nothing hides",
    )
    hiding, exposed = (
        f"{days[part]:.1f} ({days[part] / days['total']:.1%})" for part in ("may_hide", "exposed")
    )
    rows.add_row("of these, computing", f"{days['computing']:.1f}")
    rows.add_row("sending that may hide behind it", hiding)
    rows.add_row("sending that it waits for", exposed)
    rows.add_row("tokens/s of a rank, by these days", f"{result['tokens_per_second']:,.0f}")
    sent = ", ".join(
        f"{name} {size / 1e9:.1f}"
        for name, size in result["phases"][-1]["bytes_sent_by_a_rank"].items()
        if size
    )
    rows.add_row("a rank sends, 1e9 bytes a step of the last stage", sent or "nothing")
    size, writing = saving["checkpoint_bytes"] / GIB, saving["writing_seconds"]
    rows.add_row(
        "checkpoint",
        f"{size:.1f} GiB, stops training for {saving['blocking_seconds']:.2f} s, written in "
        f"{writing:.0f} s",
    )
    rows.add_row("expected faults", f"{saving['failures']:.1f}")
    for what, minutes, lost in (
        (
            f"saved every {run.checkpoint.every_tokens:,} tokens",
            saving["interval_minutes"],
            saving["lost"],
        ),
        ("best pause between saves", saving["best_minutes"], saving["best_lost"]),
    ):
        hours = lost * result["gpu_hours"]
        rows.add_row(
            what,
            f"{minutes:.1f} minutes; {lost:.2%} lost to it and to faults, {hours:,.0f} GPU hours",
        )
    return rows


def first_steps(result: dict[str, Any]) -> Table:
    """Where each stage and the full batch begin, and what the first step does."""
    grid = Table("stage", "from token", "context", "batch", "lr")
    for column in ("sequences", "micro-batches", "idle groups"):
        grid.add_column(column)
    grid.title = "first steps, by groups of ranks that share a sequence"
    for row in result["stages"]:
        grid.add_row(
            row["stage"],
            *(f"{row[key]:,}" for key in ("token", "seq_len", "batch")),
            f"{row['lr']:.3g}",
            f"{row['least_sequences']:,} to {row['most_sequences']:,}",
            *(f"{row[key]:,}" for key in ("micro_batches", "groups_without")),
        )
    return grid


def times(result: dict[str, Any]) -> Table:
    """How long the steps of each stage take, those of its ramp by themselves."""
    grid = Table("steps of", "how many", "seconds", "computing", "sending", "share", "days")
    grid.title = "time, if nothing hides"
    for phase in result["phases"]:
        time = phase["step_seconds"]
        sending = time["may_hide"] + time["exposed"]
        seconds = (f"{part:.2f}" for part in (time["total"], time["computing"], sending))
        grid.add_row(
            phase["name"],
            f"{phase['steps']:,.0f}",
            *seconds,
            f"{sending / time['total']:.1%}",
            f"{phase['days']:.2f}",
        )
    return grid


def machines(run: PlannedRun, result: dict[str, Any]) -> Table:
    """Roofline on several GPUs with recompute: an upper bound at datasheet rates, nothing sent."""
    grid = Table(
        "GPU",
        "roofline, tokens/s",
        "MFU there",
        f"days of computing at {run.plan.mfu:.0%} MFU, recompute none",
    )
    for gpu in GPUS:
        rate = result["roofline_tokens_per_second"][gpu.name]
        flops = result["ranks"] * gpu.flops * run.plan.mfu
        days = result["flops_per_token"] * result["tokens"] / flops / 86400
        grid.add_row(
            gpu.name,
            f"{rate:,.0f}",
            f"{rate * result['flops_per_token'] / gpu.flops:.0%}",
            f"{days:.1f}",
        )
    return grid


def choices(result: dict[str, Any]) -> Table:
    """Layouts: the fastest without overlap, the run's own, the first of each rejected kind."""
    grid = Table(
        "",
        "tensor",
        "context",
        "ZeRO",
        "recompute",
        "micro-batch",
        "GiB",
        "tokens/s",
        "at best",
        "",
    )
    runs = sum(row["unsupported_reason"] is None for row in result["layouts"])
    grid.title = (
        f"{runs} of {len(result['layouts'])} layouts can run; tokens/s of a rank if nothing "
        "hides, and at best"
    )
    for place, row in result["layouts_shown"]:
        cells = (
            "" if place is None else str(place),
            f"{row['tensor_parallel']}{' cut' if row['sequence_parallel'] else ''}",
            str(row["context_parallel"]),
            str(row["zero_stage"]),
            row["recompute"],
            f"{row['micro_batch_tokens']:,}",
            f"{row['memory_gib']:.1f}" if row["memory_gib"] else "",
            *(
                f"{row[key]:,.0f}" if row[key] else ""
                for key in ("tokens_per_second", "tokens_per_second_hidden")
            ),
        )
        own = row == result["layout"]
        note = "; ".join(
            text for text in ("this run's" if own else "", row["unsupported_reason"]) if text
        )
        grid.add_row(*cells, note, style="bold" if own else None)
    return grid


if __name__ == "__main__":
    main()
