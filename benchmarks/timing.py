"""Timing, tables and result files of the benchmarks."""

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
CALLS = 8  # calls between two CUDA events, and between two synchronizations of jax_scan.py
SINGLE_RUN_SECONDS = 10.0  # a longer call is not repeated


@dataclass
class Measurement:
    """Row of a result table; its seconds are a median over `runs`."""

    what: str
    shape: str
    who: str
    seconds: float
    runs: int
    ratio: float | None = None  # its seconds divided by ours


def median_seconds(
    call: Callable[[], Any], device: torch.device, budget: float = 3.0, min_runs: int = 5
) -> tuple[float, int]:
    """Median seconds of a call, and the number of runs.

    After a warm-up, measures at least `min_runs` runs and about `budget` seconds. A call longer
    than SINGLE_RUN_SECONDS is measured once. On a GPU a run is CALLS calls between two events,
    which hides the launch overhead of all but the first; a run of a long call is one call.
    """
    call()
    first = _seconds(call, device, 1)
    if first > SINGLE_RUN_SECONDS:
        return first, 1
    calls = CALLS if device.type == "cuda" and CALLS * first < budget else 1
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < min_runs or (time.perf_counter() - start < budget and len(times) < 200):
        times.append(_seconds(call, device, calls))
    return statistics.median(times), len(times)


def _seconds(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Mean seconds of consecutive calls."""
    if device.type != "cuda":
        started_at = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - started_at) / calls
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3 / calls


def time_interleaved(
    what: str,
    shape: str,
    calls: dict[str, Callable[[], Any]],
    ours: str = "ours",
    rounds: int = 7,
    turn_seconds: float = 0.05,
) -> list[Measurement]:
    """Time several calls on the CPU in interleaved turns.

    On a shared machine the speed changes from second to second, so only times of the same round
    are comparable. A turn is an untimed call, then calls for turn_seconds. Seconds are medians over
    rounds of a turn's median; ratios to `ours` are medians over rounds of the ratio in a round.
    """
    medians: dict[str, list[float]] = {who: [] for who in calls}
    runs = dict.fromkeys(calls, 0)
    for call in calls.values():
        call()
    for _ in range(rounds):
        for who, call in calls.items():
            if medians[who] and medians[who][-1] < turn_seconds:  # refill the caches
                call()
            times: list[float] = []
            while not times or sum(times) < turn_seconds:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            medians[who].append(statistics.median(times))
            runs[who] += len(times)
    return [
        Measurement(
            what,
            shape,
            who,
            statistics.median(medians[who]),
            runs[who],
            statistics.median(
                seconds / base for seconds, base in zip(medians[who], medians[ours], strict=True)
            ),
        )
        for who in calls
    ]


def add_ratios(rows: list[Measurement], ours: str) -> list[Measurement]:
    """Set each row's ratio to `ours`, if `ours` has a row of the same operation and shape."""
    base = {(row.what, row.shape): row.seconds for row in rows if row.who == ours}
    for row in rows:
        if (row.what, row.shape) in base:
            row.ratio = row.seconds / base[row.what, row.shape]
    return rows


def print_table(rows: list[Measurement], title: str) -> None:
    """Print the rows as a table."""
    table = Table("what", "shape", "who", "ms", "times ours", title=title)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.what, row.shape, row.who, f"{1e3 * row.seconds:.3f}", ratio)
    Console(width=120).print(table)


def git_commit() -> str | None:
    """Commit of this checkout; None without git."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def write_results(
    rows: list[Measurement],
    name: str,
    hardware: str,
    missing: dict[str, str],
    notes: dict[str, Any],
) -> Path:
    """Write the rows with date, hardware, commit and package versions; returns the file."""
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
        "commit": git_commit(),
        "versions": versions,
        "missing": missing,
        "notes": notes,
        "rows": [asdict(row) for row in rows],
    }
    path = RESULTS / f"{name}-{now:%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
