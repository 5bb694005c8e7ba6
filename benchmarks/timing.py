"""Timing, tables and records that both benchmarks share."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
CALLS = 8  # between two events on a GPU, and between two waits of jax_scan.py
LONG = 10.0  # seconds of a call that is not repeated


@dataclass
class Row:
    """One measurement: seconds are medians of `runs`."""

    what: str
    shape: str
    who: str
    seconds: float
    runs: int
    ratio: float | None = None  # this one's seconds over ours


def median_seconds(
    call: Callable[[], Any], device: torch.device, budget: float = 3.0, least: int = 5
) -> tuple[float, int]:
    """Median over at least `least` runs and about `budget` seconds, after a warm-up.

    On a GPU a run is CALLS calls between two events, so that the host's part of all but the first
    does not count; it is one call where that takes long, and the only run where it takes LONG
    seconds.
    """
    call()
    first = _seconds(call, device, 1)
    if first > LONG:
        return first, 1
    calls = CALLS if device.type == "cuda" and CALLS * first < budget else 1
    times: list[float] = []
    spent = time.perf_counter()
    while len(times) < least or (time.perf_counter() - spent < budget and len(times) < 200):
        times.append(_seconds(call, device, calls))
    return statistics.median(times), len(times)


def _seconds(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Mean of some calls one after another."""
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begun) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3 / calls


def in_turn(
    what: str,
    shape: str,
    calls: dict[str, Callable[[], Any]],
    ours: str = "ours",
    rounds: int = 7,
    turn: float = 0.05,
) -> list[Row]:
    """A row for each call on the processor. They take turns, since its speed changes by the second
    where others work.

    A turn is one call that does not count, then calls for `turn` seconds. Seconds are medians over
    rounds of a turn's median; ratios to ours are medians over rounds of ratios within one.
    """
    medians: dict[str, list[float]] = {who: [] for who in calls}
    runs = dict.fromkeys(calls, 0)
    for call in calls.values():
        call()
    for _ in range(rounds):
        for who, call in calls.items():
            if medians[who] and medians[who][-1] < turn:  # caches hold what the others left
                call()
            times: list[float] = []
            while not times or sum(times) < turn:
                begun = time.perf_counter()
                call()
                times.append(time.perf_counter() - begun)
            medians[who].append(statistics.median(times))
            runs[who] += len(times)
    return [
        Row(
            what,
            shape,
            who,
            statistics.median(medians[who]),
            runs[who],
            statistics.median(
                theirs / base for theirs, base in zip(medians[who], medians[ours], strict=True)
            ),
        )
        for who in calls
    ]


def with_ratios(rows: list[Row], ours: str) -> list[Row]:
    """Fill each row's ratio to ours, where ours was measured on the same problem."""
    base = {(row.what, row.shape): row.seconds for row in rows if row.who == ours}
    for row in rows:
        if (row.what, row.shape) in base:
            row.ratio = row.seconds / base[row.what, row.shape]
    return rows


def show(rows: list[Row], title: str) -> None:
    """The rows as a table."""
    table = Table("what", "shape", "who", "ms", "times ours", title=title)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.what, row.shape, row.who, f"{1e3 * row.seconds:.3f}", ratio)
    Console(width=120).print(table)


def commit() -> str | None:
    """The commit of this checkout; None without git."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def write(
    rows: list[Row], name: str, hardware: str, missing: dict[str, str], notes: dict[str, Any]
) -> Path:
    """Write the rows with date, hardware, commit and versions; returns the file."""
    packages = (
        "torch",
        "transformers",
        "mambapy",
        "mamba-ssm",
        "causal-conv1d",
        "cuda-core",
        "liger-kernel",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    now = datetime.now(UTC)
    record = {
        "date": now.isoformat(timespec="seconds"),
        "hardware": hardware,
        "python": platform.python_version(),
        "commit": commit(),
        "versions": versions,
        "missing": missing,
        "notes": notes,
        "rows": [asdict(row) for row in rows],
    }
    path = RESULTS / f"{name}-{now:%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
