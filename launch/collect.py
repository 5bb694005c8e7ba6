"""Compare the runs of a sweep: a table, collected.csv and collected.html in its folder."""

import argparse
import csv
import sys
from io import StringIO
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from rich.measure import Measurement
from rich.table import Table
from typing_extensions import TypedDict

from core.console import table_console
from core.errors import InputError
from core.files import write_text
from core.ranges import Finite
from core.records import read_or_rebuild
from core.run import RunFiles
from core.sweep import SWEEP, read_points
from core.units import short
from train.metrics.page import page
from train.metrics.records import read_lines
from train.resilience.incidents import FINISHED, describe_state, read_outcome

LAST_FRACTION = 0.05  # last part of a run's tokens over which its final loss is averaged
RANKING = ("bits_per_byte", "validation", "loss")  # runs are sorted by the first that exists
EXAMPLES = """examples:
  python launch/collect.py runs/sweeps/norms
  python launch/collect.py runs/sweeps/130m-decay_tokens-lr
"""
Row = dict[str, Any]


class HeldoutRow(TypedDict):
    """A source's row of eval.json, or that of all sources."""

    bits_per_byte: Finite


class HeldoutRows(TypedDict):
    """The rows of eval.json of which one is compared."""

    all: HeldoutRow


class Evaluation(TypedDict):
    """What is compared of eval.json."""

    heldout: HeldoutRows


def sweep_rows(folder: Path) -> list[Row]:
    """One row per point of sweep.json: swept values, progress, final losses in nats per token."""
    points = read_points(folder)
    if not points:
        raise InputError(f"{folder} has no {SWEEP}; give the folder of a `launch/submit.py -m`")
    return [
        {"run": label, **values, **run_results(folder / label)} for label, values in points.items()
    ]


def run_results(run: Path) -> Row:
    """Tokens, state and losses of one run, as far as they exist."""
    files = RunFiles(run)
    records = read_lines(files.metrics)
    outcome = read_outcome(run)
    state = describe_state(run)
    if outcome is not None and outcome.code == FINISHED:
        state = "finished"
    elif outcome is None and not records:
        state = "not started"
    if not records:
        return {"tokens": 0, "state": state}
    tokens = records[-1]["tokens"]
    row: Row = {"tokens": tokens, "state": state, "loss": final_loss(records)}
    validated = [record for record in records if record.get("validation")]
    if validated:
        losses = {
            name: entry["loss"]
            for name, entry in sorted(validated[-1]["validation"].items())
            if entry["loss"] is not None
        }
        if losses:
            row["validation"] = sum(losses.values()) / len(losses)
        row |= {f"validation/{name}": loss for name, loss in losses.items()}
        row["validated_at"] = validated[-1]["tokens"]
    if evaluation := read_or_rebuild(
        files.evaluation, Evaluation, "its scores are left out", extra="ignore"
    ):
        row["bits_per_byte"] = evaluation["heldout"]["all"]["bits_per_byte"]
    row["grad_norm_max"] = max(record["grad_norm"] or 0.0 for record in records)
    row["skipped"] = sum(bool(record["skipped"]) for record in records)
    return row


def final_loss(records: list[Row]) -> float | None:
    """Mean loss of the last tokens, weighted by tokens per step; None without a finite loss."""
    first_token = (1 - LAST_FRACTION) * records[-1]["tokens"]
    starts = [0, *(record["tokens"] for record in records)]
    step_tokens = {
        record["step"]: record["tokens"] - start
        for start, record in zip(starts, records, strict=False)
    }
    last = [
        record
        for record in records
        if record["tokens"] > first_token and record["loss"] is not None
    ]
    total = sum(step_tokens[record["step"]] for record in last)
    if not total:
        return None
    return sum(record["loss"] * step_tokens[record["step"]] for record in last) / total


def show(folder: Path, rows: list[Row], keys: list[str]) -> None:
    """Print the table, without losses per source, which are only in collected.csv."""
    table = Table(title=str(folder))
    for key in keys:
        table.add_column(
            key.rsplit(".", 1)[-1], justify="left" if key == "state" else "right", no_wrap=True
        )
    for row in rows:
        cells = []
        for key in keys:
            value = row.get(key, "")
            if key in ("tokens", "validated_at") and key in row:
                value = short(value)
            cells.append(f"{value:.4f}" if isinstance(value, float) else str(value))
        table.add_row(*cells)
    console = table_console()
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    table_console(max(console.width, width)).print(table)  # never truncate figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=format_commands("python launch/collect.py"),
        description=__doc__,
        epilog=format_commands(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of a sweep")
    folder = parser.parse_args().folder
    rows = sweep_rows(folder)
    ranking = next((key for key in RANKING if any(key in row for row in rows)), "loss")
    rows.sort(key=lambda row: float("inf") if row.get(ranking) is None else row[ranking])
    keys = list(dict.fromkeys(key for row in rows for key in row))
    show(folder, rows, [key for key in keys if key != "run" and "/" not in key])
    table = StringIO(newline="")
    writer = csv.DictWriter(table, keys)
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "collected.csv", table.getvalue())
    print(folder / "collected.csv")
    if started := [folder / row["run"] for row in rows if row["tokens"]]:
        print(page(started, folder / "collected.html"))


if __name__ == "__main__":
    main()
