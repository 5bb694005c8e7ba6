"""Held-out bits per byte of a run with initial weights: before it, at its best, and at last.

Sources with `old` are of the kind that the weights were trained on: what they lose is forgotten.
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from core.old_keys import read_record
from core.run import RunFiles
from train.metrics.records import Record, SourceValidation, read_initial, read_lines

TITLES = ["source", "text", "before", "best", "last", "change"]
UNIT = "held-out bits per byte"
OLD, NEW = "old", "new"
Rows = list[tuple[Any, ...]]


def forgetting_rows(
    config: dict[str, Any], initial: dict[str, SourceValidation], records: list[Record]
) -> Rows:
    """A row of TITLES for each source of the initial weights' record, new sources first.

    `config` is the run's recorded one. Empty for runs that began with random weights; a dash
    stands for what was not measured.
    """
    sources = config.get("data", {}).get("sources", {})
    rows: Rows = []
    for name, first in initial.items():
        kind = OLD if (sources.get(name) or {}).get("old") else NEW
        before = first.get("bits_per_byte")
        later = [
            record["validation"][name].get("bits_per_byte")
            for record in records
            if name in (record.get("validation") or {})
        ]
        values = [value for value in later if value is not None]
        last = later[-1] if later else None
        change = None if before is None or last is None else last - before
        best = min(values, default=None)
        shown = "-" if change is None else f"{change:+.4f}"
        rows.append((name, kind, *map(_format_bits, (before, best, last)), shown))
    return sorted(rows, key=lambda row: row[1] == OLD)


def _format_bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.4f}"


def forgetting_table(folder: Path) -> Table | None:
    """The table of a run's folder for a console; None for a run that began with random weights."""
    files = RunFiles(folder)
    initial = read_initial(files.metrics)
    if not initial:
        return None
    table = Table(*TITLES, title=UNIT, title_justify="left")
    for row in forgetting_rows(read_record(files.config), initial, read_lines(files.metrics)):
        table.add_row(*row)
    return table
