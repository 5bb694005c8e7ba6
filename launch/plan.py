"""Plan a run before allocating anything: memory, time, communication, failures and layouts.

Prints memory per rank, days and GPU hours at an assumed MFU, the roofline of several GPUs, bytes
sent, cost of checkpoints and failures, the steps of each stage, and the layouts that fit. Also
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

from rich.table import Table

from core.command import command
from core.console import table_console
from core.errors import InputError
from core.files import make_folder, write_json
from launch.planning.estimate import (
    PlannedRun,
    StepTime,
    bytes_sent_per_step,
    phase_times,
    planned_gpu,
    reliability,
    roofline_seconds,
)
from launch.planning.layouts import enumerate_layouts, evaluate_layout, select_layouts
from model.flops import parameter_count, train_flops_per_token, train_memory_traffic
from train.costs.gpus import GPUS
from train.costs.memory import GIB, estimate_memory, headroom_bytes
from train.schedule import Schedule

MAX_LAYOUTS_SHOWN = 12
SECONDS_PER_DAY = 86400


def plan(run: PlannedRun) -> dict[str, Any]:
    """The whole plan as plain values: seconds, bytes, tokens, days."""
    ranks = run.cluster.nodes * run.cluster.ranks_per_node
    group = run.parallel.tensor_parallel * run.parallel.context_parallel
    if group > ranks:
        raise InputError(
            f"parallel.tensor_parallel x context_parallel needs {group} ranks, and cluster.nodes x "
            f"ranks_per_node is {ranks}: raise cluster.nodes, or lower one of the others"
        )
    gpu = planned_gpu(run)
    memory = estimate_memory(run, ranks)
    times = phase_times(run, ranks, gpu)
    days: dict[str, float] = {}
    for phase, time in times:
        for name, seconds in step_seconds(time).items():
            days[name] = days.get(name, 0.0) + phase.steps * seconds / SECONDS_PER_DAY
    layouts = enumerate_layouts(run, ranks, gpu)
    configured = evaluate_layout(run, run.parallel, run.compute.recompute, ranks, gpu)
    return {
        "run": run.run.name,
        "ranks": ranks,
        "parameters": parameter_count(run.model),
        "tokens": run.tokens,
        "flops_per_token": train_flops_per_token(run.model),
        "bytes_per_token": asdict(train_memory_traffic(run.model)),
        "memory_of_a_rank": asdict(memory) | {"total": memory.total},
        "gpu": gpu.name,
        "mfu": run.plan.mfu,
        "days": days,
        "gpu_hours": 24 * days["total"] * ranks,
        "tokens_per_second": configured.tokens_per_second,
        "phases": [
            {
                **asdict(phase),
                "step_seconds": step_seconds(time),
                "days": phase.steps * time.total / SECONDS_PER_DAY,
                "bytes_sent_by_a_rank": bytes_sent_per_step(run, ranks, phase.batch, phase.seq_len),
            }
            for phase, time in times
        ],
        "reliability": asdict(reliability(run, ranks, days["total"])),
        "roofline_tokens_per_second": {
            other.name: 1 / roofline_seconds(run, other) for other in GPUS
        },
        "stages": stage_starts(run, ranks),
        "layout": asdict(configured),
        "layouts": [asdict(layout) for layout in layouts],
        "layouts_shown": [
            (position, asdict(layout))
            for position, layout in select_layouts(layouts, configured, MAX_LAYOUTS_SHOWN)
        ],
    }


def step_seconds(time: StepTime) -> dict[str, float]:
    """A step's seconds under the keys of plan.json."""
    return {
        "computing": time.compute,
        "may_hide": time.overlappable,
        "exposed": time.exposed,
        "total": time.total,
    }


def stage_starts(run: PlannedRun, ranks: int) -> list[dict[str, Any]]:
    """First step of each stage and of the full batch, with sequences per group of ranks."""
    schedule = Schedule(run.schedule, run.optim.lr, run.data)
    groups = ranks // (run.parallel.tensor_parallel * run.parallel.context_parallel)
    starts = {0, *(end for end, _, _ in schedule.stages[:-1])}
    starts.add(min(run.schedule.ramp_tokens, schedule.total - 1))
    rows = []
    for token in sorted(starts):
        step = schedule.at(token)
        max_sequences = -(-step.batch // groups)
        micro_batch = run.parallel.micro_batch_tokens // step.seq_len
        rows.append(
            {
                **asdict(step),
                "token": token,
                "least_sequences": step.batch // groups,
                "most_sequences": max_sequences,
                "micro_batches": -(-max_sequences // micro_batch),
                "groups_without": max(0, groups - step.batch),
            }
        )
    return rows


@command(PlannedRun)
def main(run: PlannedRun) -> None:
    """Print the plan and write it to the run's folder."""
    result = plan(run)
    console = table_console()
    console.print(summary_table(run, result))
    console.print(stage_start_table(result))
    console.print(step_time_table(result))
    console.print(gpu_table(run, result))
    console.print(layout_table(result))
    path = run.run.files.plan
    make_folder(path.parent)
    write_json(path, result)
    console.print(f"wrote {path}", soft_wrap=True)


def summary_table(run: PlannedRun, result: dict[str, Any]) -> Table:
    """Size, memory, time, communication, checkpoints and failures."""
    table = Table(
        title=f"{result['run']} on {result['ranks']} ranks ({result['gpu']})", show_header=False
    )
    table.add_row("parameters", f"{result['parameters']:,}")
    table.add_row("tokens", f"{result['tokens']:,}")
    table.add_row("training FLOPs per token", f"{result['flops_per_token']:.4g}")
    table.add_row("training FLOPs", f"{result['flops_per_token'] * result['tokens']:.3g}")
    for name, size in result["memory_of_a_rank"].items():
        table.add_row(f"memory per rank, {name}", f"{size / GIB:.1f} GiB")
    if run.cluster.memory_gib is not None:
        reserved = headroom_bytes(run, run.cluster.device.value) / GIB
        table.add_row(
            "memory per rank, available",
            f"{run.cluster.memory_gib:g} GiB less {reserved:g} of headroom",
        )
    days = result["days"]
    assumptions = f"{result['mfu']:.0%} MFU, recompute {run.compute.recompute.value}"
    table.add_row(
        f"days at {assumptions}",
        f"{days['total']:.1f} ({result['gpu_hours']:,.0f} GPU hours), without overlap",
    )
    for label, key in (
        ("  compute", "computing"),
        ("  communication that can overlap", "may_hide"),
        ("  exposed communication", "exposed"),
    ):
        table.add_row(label, f"{days[key]:.1f} ({days[key] / days['total']:.1%})")
    table.add_row("tokens/s per rank, without overlap", f"{result['tokens_per_second']:,.0f}")
    sent = ", ".join(
        f"{name} {size / 1e9:.1f}"
        for name, size in result["phases"][-1]["bytes_sent_by_a_rank"].items()
        if size
    )
    table.add_row("GB sent per rank and step, last stage", sent or "none")
    saving = result["reliability"]
    table.add_row(
        "checkpoint",
        f"{saving['checkpoint_bytes'] / GIB:.1f} GiB, stops training for "
        f"{saving['blocking_seconds']:.2f} s, written in {saving['writing_seconds']:.0f} s",
    )
    table.add_row("expected failures", f"{saving['failures']:.1f}")
    for label, minutes, lost in (
        (
            f"save every {run.checkpoint.every_tokens:,} tokens",
            saving["interval_minutes"],
            saving["lost"],
        ),
        ("best save interval", saving["best_minutes"], saving["best_lost"]),
    ):
        hours = lost * result["gpu_hours"]
        table.add_row(
            label,
            f"{minutes:.1f} minutes; {lost:.2%} lost to saves and failures, {hours:,.0f} GPU hours",
        )
    return table


def stage_start_table(result: dict[str, Any]) -> Table:
    """The first step of each stage and of the full batch."""
    table = Table("stage", "from token", "context", "batch", "lr")
    for column in ("sequences", "micro-batches", "idle groups"):
        table.add_column(column)
    table.title = "first step of each stage, per group of ranks that shares sequences"
    for row in result["stages"]:
        table.add_row(
            row["stage"],
            *(f"{row[key]:,}" for key in ("token", "seq_len", "batch")),
            f"{row['lr']:.3g}",
            f"{row['least_sequences']:,} to {row['most_sequences']:,}",
            *(f"{row[key]:,}" for key in ("micro_batches", "groups_without")),
        )
    return table


def step_time_table(result: dict[str, Any]) -> Table:
    """Time per step and phase; batch ramps have their own rows."""
    table = Table("steps of", "count", "seconds", "compute", "communication", "share", "days")
    table.title = "time per step, without overlap"
    for phase in result["phases"]:
        seconds = phase["step_seconds"]
        communication = seconds["may_hide"] + seconds["exposed"]
        table.add_row(
            phase["name"],
            f"{phase['steps']:,.0f}",
            f"{seconds['total']:.2f}",
            f"{seconds['computing']:.2f}",
            f"{communication:.2f}",
            f"{communication / seconds['total']:.1%}",
            f"{phase['days']:.2f}",
        )
    return table


def gpu_table(run: PlannedRun, result: dict[str, Any]) -> Table:
    """Roofline per GPU with recompute: an upper bound at datasheet rates, without communication."""
    table = Table(
        "GPU",
        "roofline, tokens/s",
        "MFU at roofline",
        f"days of compute at {run.plan.mfu:.0%} MFU, recompute none",
    )
    for gpu in GPUS:
        rate = result["roofline_tokens_per_second"][gpu.name]
        flops = result["ranks"] * gpu.flops * run.plan.mfu
        days = result["flops_per_token"] * result["tokens"] / flops / SECONDS_PER_DAY
        table.add_row(
            gpu.name,
            f"{rate:,.0f}",
            f"{rate * result['flops_per_token'] / gpu.flops:.0%}",
            f"{days:.1f}",
        )
    return table


def layout_table(result: dict[str, Any]) -> Table:
    """The fastest layouts, the run's own, and the first of each kind that cannot run."""
    columns = ("", "TP", "CP", "ZeRO", "recompute", "micro-batch", "GiB", "tokens/s", "overlapped")
    table = Table(*columns, "")
    runnable = sum(row["unsupported_reason"] is None for row in result["layouts"])
    table.title = (
        f"{runnable} of {len(result['layouts'])} layouts can run; tokens/s per rank without and "
        "with overlap"
    )
    for position, row in result["layouts_shown"]:
        cells = [
            "" if position is None else str(position),
            f"{row['tensor_parallel']}{' + SP' if row['sequence_parallel'] else ''}",
            str(row["context_parallel"]),
            str(row["zero_stage"]),
            row["recompute"],
            f"{row['micro_batch_tokens']:,}",
            f"{row['memory_gib']:.1f}" if row["memory_gib"] else "",
        ]
        for key in ("tokens_per_second", "tokens_per_second_hidden"):
            cells.append(f"{row[key]:,.0f}" if row[key] else "")
        is_configured = row == result["layout"]
        notes = ["this run's"] if is_configured else []
        notes += [row["unsupported_reason"]] if row["unsupported_reason"] else []
        table.add_row(*cells, "; ".join(notes), style="bold" if is_configured else None)
    return table


if __name__ == "__main__":
    main()
