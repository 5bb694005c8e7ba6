"""Show how runs are doing: a line each, from the files in their folders.

Without arguments all of runs/*. Reads only the ends of long files, and writes nothing.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from rich.measure import Measurement
from rich.table import Table

from core.console import table_console
from core.errors import USER_ERROR, InputError
from core.old_keys import read_record
from core.records import Damage, DamagedRecord, read_newest_lines, read_typed
from core.run import MANIFEST, RunFiles, iter_committed_checkpoints, step_number
from core.units import end_time, short
from train.metrics.records import LINE, Record, is_step
from train.resilience.incidents import (
    FINISHED,
    INTERRUPTED,
    Incident,
    OutcomeRecord,
    is_running,
)

# of metrics.jsonl: records of the 600 steps between two validations of 7b take one MB
METRICS_BYTES = 2**24
INCIDENTS_BYTES = 2**22
SQUEUE_SECONDS = 10.0
WATCH_SECONDS = 5.0
MAX_REASON = 60  # characters of why a run failed
DAMAGED = "damaged"
COLUMNS = (
    *("run", "state", "step", "tokens", "loss", "held-out", "tok/s", "ends", "last save"),
    *("incidents", "queue"),
)
EXAMPLES = """examples:
  python launch/status.py
  python launch/status.py runs/7b --watch
  python launch/status.py runs/sweeps/norms/*
"""


@dataclass
class Newest:
    """The newest records of a run."""

    step: Record | None = None
    validated: Record | None = None  # the newest step with held-out losses
    damage: list[str] = field(default_factory=list)  # names of damaged files


def newest_records(folder: Path) -> Newest:
    """Read the end of metrics.jsonl back to the last held-out losses, METRICS_BYTES at most."""
    path = RunFiles(folder).metrics
    damage = Damage(path)
    newest = Newest()
    try:
        for record in read_newest_lines(path, LINE, damage, METRICS_BYTES):
            if not is_step(record):
                continue
            newest.step = newest.step or record
            if record.get("validation"):
                newest.validated = record
                break
    except (OSError, DamagedRecord):
        newest.damage.append(path.name)
    # the line that is being written, or that a crash cut, is no damage
    if [number for number in damage.numbers if number > 1]:
        newest.damage.append(path.name)
    return newest


def total_tokens(folder: Path) -> int | None:
    """Tokens of all stages in whole blocks; None where config.yaml does not say them."""
    data = read_record(RunFiles(folder).config).get("data", {})
    block = data.get("block_tokens", 1)
    stages = data.get("stages", [])
    if not stages or any("tokens" not in stage for stage in stages):
        return None
    return sum(int(stage["tokens"]) // block * block for stage in stages)


def state(folder: Path, started: bool) -> str:
    """Finished, interrupted, failed and why, running, or crashed."""
    path = RunFiles(folder).outcome
    if path.exists():
        outcome = read_typed(path, OutcomeRecord)
        names = {FINISHED: "finished", INTERRUPTED: "interrupted"}
        reason = outcome["reason"]
        short_reason = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}..."
        return names.get(outcome["code"], f"failed: {short_reason}")
    if is_running(folder):
        return "running" if started else "starting"
    return "crashed" if started or RunFiles(folder).lock.exists() else "not started"


def heldout(record: Record | None) -> str:
    """Mean held-out loss of all sources, and the tokens at which it was measured."""
    losses = [] if record is None else [entry["loss"] for entry in record["validation"].values()]
    finite = [loss for loss in losses if loss is not None]
    if record is None or not finite:
        return "-"
    return f"{sum(finite) / len(finite):.3f} at {short(record['tokens'])}"


def last_save(folder: Path) -> str:
    """Step and age of the newest committed checkpoint."""
    for checkpoint in iter_committed_checkpoints(RunFiles(folder).checkpoints):
        seconds = time.time() - (checkpoint / MANIFEST).stat().st_mtime
        return f"{step_number(checkpoint):,}, {age(seconds)} ago"
    return "-"


def age(seconds: float) -> str:
    """A duration in one unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def incidents(folder: Path) -> str:
    """Number of incidents, and the kind of the last."""
    path = RunFiles(folder).incidents
    kinds = [
        line["incident"]
        for line in read_newest_lines(path, Incident, Damage(path), INCIDENTS_BYTES)
    ]
    cut = "over " if path.exists() and path.stat().st_size > INCIDENTS_BYTES else ""
    return f"{cut}{len(kinds)}, last {kinds[0]}" if kinds else "-"


def read_or_say(read: Callable[[], Any], otherwise: Any = DAMAGED) -> Any:
    """What `read` returns, or `otherwise` where its file is damaged or cannot be read."""
    try:
        return read()
    except (OSError, InputError):
        return otherwise


def row(folder: Path, queue: dict[str, str]) -> dict[str, str]:
    """The cells of a run's line by column."""
    newest = newest_records(folder)
    step = newest.step
    total = read_or_say(lambda: total_tokens(folder))
    if total == DAMAGED:
        newest.damage.append(RunFiles(folder).config.name)
        total = None
    cells = {
        "run": folder.name,
        "state": read_or_say(lambda: state(folder, step is not None)),
        "held-out": heldout(newest.validated),
        "last save": read_or_say(lambda: last_save(folder)),
        "incidents": read_or_say(lambda: incidents(folder)),
        "queue": queue.get(folder.name, ""),
    }
    if step is not None:
        rate = step.get("tokens_per_second")
        left = None if total is None else total - step["tokens"]
        cells |= {
            "step": f"{step['step']:,}",
            "tokens": short(step["tokens"]) + ("" if total is None else f" of {short(total)}"),
            "loss": "not finite" if step["loss"] is None else f"{step['loss']:.3f}",
            "tok/s": short(rate) if rate else "-",
        }
        if rate and left and cells["state"] == "running":
            cells["ends"] = end_time(left / rate)
    if newest.damage:
        cells["state"] += f" ({', '.join(newest.damage)} {DAMAGED})"
    return cells


def slurm_queue() -> dict[str, str]:
    """State of this user's Slurm jobs by run: stage, state and why it waits; empty without squeue.

    A run's jobs are named RUN-STAGE (launch/slurm/script.py).
    """
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--format=%j|%T|%r"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    queue: dict[str, str] = {}
    for line in result.stdout.splitlines():
        name, status, reason = (*line.split("|"), "", "")[:3]
        run, _, stage = name.rpartition("-")
        waits = "" if reason in ("None", "") else f" ({reason})"
        text = f"{stage} {status.lower()}{waits}"
        queue[run] = f"{queue[run]}, {text}" if run in queue else text
    return queue


def status_table(folders: list[Path]) -> Table:
    """A line a run; columns that no run fills are left out."""
    queue = slurm_queue()
    rows = [row(folder, queue) for folder in folders]
    table = Table(box=None, pad_edge=False)
    columns = [key for key in COLUMNS if any(cells.get(key) for cells in rows)]
    for key in columns:
        table.add_column(key, no_wrap=True)
    for cells in rows:
        table.add_row(*(cells.get(key) or "-" for key in columns))
    return table


def show(table: Table) -> None:
    """Print the table without cutting cells."""
    console = table_console()
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    table_console(max(console.width, width)).print(table)


def is_run(folder: Path) -> bool:
    """Whether a run has begun to write the folder."""
    files = RunFiles(folder)
    return any(path.exists() for path in (files.config, files.metrics, files.attempts, files.lock))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=format_commands("python launch/status.py"),
        description=__doc__,
        epilog=format_commands(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, help="folders of runs; default: all of runs/*"
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"show it again every SECONDS ({WATCH_SECONDS:g}), until Ctrl-C",
    )
    args = parser.parse_args()
    folders = args.runs or sorted(path for path in Path("runs").glob("*") if is_run(path))
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        parser.exit(USER_ERROR, f"error: no folder {', '.join(missing)}: name folders of runs\n")
    if not folders:
        parser.exit(USER_ERROR, "error: no run in runs/: name folders of runs\n")
    if args.watch is None:
        show(status_table(folders))
        return
    with suppress(KeyboardInterrupt):
        while True:
            table = status_table(folders)
            table_console().clear()  # nothing where the output is no terminal
            show(table)
            time.sleep(max(0.1, args.watch))


if __name__ == "__main__":
    main()
