"""The runs of a sweep side by side: a table, collected.csv and collected.html in its folder."""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from core.errors import InputError
from core.files import read_json
from core.run import RunFiles
from launch.jobs.sweep import SWEEP
from train.metrics.page import page
from train.metrics.records import read_lines, short
from train.resilience.incidents import read_outcome

LAST = 0.05  # share of a run's tokens whose mean loss stands for its end: one batch is noise
# what runs are ordered by: the first that was measured
BEST = ("bits_per_byte", "validation", "loss")
EXAMPLES = """examples:
  python launch/collect.py runs/sweeps/norms
  python launch/collect.py runs/sweeps/130m-decay_tokens-lr
"""
Row = dict[str, Any]


def rows_of(folder: Path) -> list[Row]:
    """One row per point of sweep.json: varied values, progress, final losses in nats per token."""
    points = read_json(folder / SWEEP).get("points")
    if points is None:
        raise InputError(
            f"{folder} holds no {SWEEP}; name a folder that launch/submit.py -m has made"
        )
    return [
        {"run": label, **values, **measured(folder / label)} for label, values in points.items()
    ]


def measured(run: Path) -> Row:
    """Figures of one run; a run that has not begun has none."""
    files = RunFiles(run)
    records = read_lines(files.metrics)
    outcome = read_outcome(run)
    state = (
        "running or crashed" if outcome is None else outcome.reason if outcome.code else "finished"
    )
    if not records:
        return {"tokens": 0, "state": "not started" if outcome is None else state}
    tokens = records[-1]["tokens"]
    last = [
        record
        for record in records
        if record["tokens"] > (1 - LAST) * tokens and record["loss"] is not None
    ]
    before = [0, *(record["tokens"] for record in records)]
    spans = {
        record["step"]: record["tokens"] - start
        for start, record in zip(before, records, strict=False)
    }
    weight = sum(spans[record["step"]] for record in last)
    row: Row = {"tokens": tokens, "state": state}
    row["loss"] = (
        sum(record["loss"] * spans[record["step"]] for record in last) / weight if weight else None
    )
    validated = [record for record in records if record.get("validation")]
    if validated:
        losses = {
            name: entry["loss"] for name, entry in sorted(validated[-1]["validation"].items())
        }
        row["validation"] = sum(losses.values()) / len(losses)
        row |= {f"validation/{name}": loss for name, loss in losses.items()}
        row["validated_at"] = validated[-1]["tokens"]
    if heldout := read_json(files.evaluation).get("heldout"):
        row["bits_per_byte"] = heldout["all"]["bits_per_byte"]
    row["grad_norm_max"] = max(record["grad_norm"] or 0.0 for record in records)
    row["skipped"] = sum(bool(record["skipped"]) for record in records)
    return row


def show(folder: Path, rows: list[Row], keys: list[str]) -> None:
    """Print the table, runs named by what was varied; losses per source are in the file only."""
    table = Table(title=str(folder))
    for key in keys:
        table.add_column(
            key.rsplit(".", 1)[-1], justify="left" if key == "state" else "right", no_wrap=True
        )
    for row in rows:
        values = [
            short(row[key])
            if key in ("tokens", "validated_at") and key in row
            else row.get(key, "")
            for key in keys
        ]
        table.add_row(
            *(f"{value:.4f}" if isinstance(value, float) else str(value) for value in values)
        )
    console = Console()
    wide = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, wide)).print(table)  # figures that are cut off help nobody


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=format_commands("python launch/collect.py"),
        description=__doc__,
        epilog=format_commands(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of a sweep")
    folder = parser.parse_args().folder
    rows = rows_of(folder)
    best = next((key for key in BEST if any(key in row for row in rows)), "loss")
    rows.sort(key=lambda row: float("inf") if row.get(best) is None else row[best])
    keys = list(dict.fromkeys(key for row in rows for key in row))
    show(folder, rows, [key for key in keys if key != "run" and "/" not in key])
    with (folder / "collected.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    print(folder / "collected.csv")
    if begun := [folder / row["run"] for row in rows if row["tokens"]]:
        print(page(begun, folder / "collected.html"))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
