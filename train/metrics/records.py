"""metrics.jsonl: a record per step, and a record per checkpoint with leaderboard scores.

A record of scores has the step and tokens of its checkpoint and the scores by suite. It is written
when the scores arrive, after records of later steps.
"""

import errno
import json
import logging
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

from core.files import read_json_lines, write_text

logger = logging.getLogger(__name__)

Record = dict[str, Any]
POINTS = 2000  # of a curve on the page; more points are averaged, which bounds the page size


class JsonLines:
    """A JSON Lines file without duplicates across restarts: a start drops records after `tokens`.

    While the disk is full, up to MAX_WAITING lines wait in memory and are written later.
    """

    MAX_WAITING = 100_000

    def __init__(self, path: Path, tokens: int) -> None:
        lines = [line for line in read_json_lines(path) if line["tokens"] <= tokens]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.end = path.stat().st_size
        self.waiting: deque[bytes] = deque(maxlen=self.MAX_WAITING)

    def write(self, record: Record) -> None:
        """Append a record; NaN and infinity, which JSON lacks, become null."""
        if not self.waiting:
            self.failed = False
        self.waiting.append((json.dumps(finite(record)) + "\n").encode())
        try:
            while self.waiting:
                self._append(self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            if not self.failed:
                logger.warning(f"cannot write metrics.jsonl ({error}); records wait in memory")
            self.failed = True

    def _append(self, line: bytes) -> None:
        """Write the complete line, or restore the length of the file and raise OSError."""
        written = self.file.write(line)
        if written != len(line):  # the disk filled up within the line
            self.file.truncate(self.end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.end += written

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        if self.waiting:
            logger.warning(f"lost the last {len(self.waiting)} lines of metrics.jsonl")


def read_lines(path: Path) -> list[Record]:
    """Records of steps in a metrics file, or all lines of another JSON Lines file.

    A last line truncated by a kill is dropped.
    """
    return [record for record in read_json_lines(path) if "scores" not in record]


def read_scores(path: Path) -> list[Record]:
    """Records of scores in a metrics file, ordered by tokens."""
    return sorted(
        (record for record in read_json_lines(path) if "scores" in record),
        key=lambda record: record["tokens"],
    )


def finite(value: Any) -> Any:
    """The value with None in place of NaN and infinity, in nested dicts too."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(count: float) -> str:
    """Format a count with three digits and a unit: 1.8M, 5.8T."""
    for unit in ("", "k", "M", "B", "T"):
        if abs(count) < 999.5 or unit == "T":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError


def curve(
    points: list[tuple[int, float | None]], max_points: int = POINTS
) -> tuple[list[int], list[float | None]]:
    """Average a curve down to `max_points` points: means over equal spans, at the last x of each.

    None values are left out; a span of only None gives None.
    """
    span = -(-len(points) // max_points) if points else 1
    x: list[int] = []
    y: list[float | None] = []
    for start in range(0, len(points), span):
        values = [value for _, value in points[start : start + span] if value is not None]
        x.append(points[min(start + span, len(points)) - 1][0])
        y.append(sum(values) / len(values) if values else None)
    return x, y
