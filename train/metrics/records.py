"""metrics.jsonl: a record of each step, and one of each checkpoint's leaderboard scores.

A record of scores has the step and tokens of its checkpoint and the scores by suite. It is written
when the scores arrive, so it follows records of later steps.
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
POINTS = 2000  # of a curve on a page; longer runs are averaged, so that the page does not grow


class JsonLines:
    """One JSON object per line, in the order of tokens, without duplicates across restarts.

    While the disk is full, up to MAX_WAITING lines wait in memory and are written later.
    """

    MAX_WAITING = 100_000

    def __init__(self, path: Path, tokens: int) -> None:
        kept = [line for line in read_json_lines(path) if line["tokens"] <= tokens]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.end = path.stat().st_size
        self.waiting: deque[bytes] = deque(maxlen=self.MAX_WAITING)

    def write(self, record: Record) -> None:
        """Append a record; values that JSON lacks (NaN, infinity) become null."""
        if not self.waiting:
            self.failed = False
        self.waiting.append((json.dumps(finite(record)) + "\n").encode())
        try:
            while self.waiting:
                self._append(self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            if not self.failed:
                logger.warning(f"cannot write metrics.jsonl ({error}); its lines wait in memory")
            self.failed = True

    def _append(self, line: bytes) -> None:
        """Write a whole line, or restore the length of the file and raise OSError."""
        written = self.file.write(line)
        if written != len(line):  # the disk was full in the middle
            self.file.truncate(self.end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.end += written

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        if self.waiting:
            logger.warning(f"lost the last {len(self.waiting)} lines of metrics.jsonl")


def read_lines(path: Path) -> list[Record]:
    """Records of the steps in a metrics file, or all of another JSON Lines file; drops a last line
    that a kill has truncated.
    """
    return [record for record in read_json_lines(path) if "scores" not in record]


def read_scores(path: Path) -> list[Record]:
    """The records of scores in a metrics file, in the order of their tokens."""
    return sorted(
        (record for record in read_json_lines(path) if "scores" in record),
        key=lambda record: record["tokens"],
    )


def finite(value: Any) -> Any:
    """The same value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(count: float) -> str:
    """A count with three digits and a unit: 1.8M, 5.8T."""
    for unit in ("", "k", "M", "B", "T"):
        if abs(count) < 999.5 or unit == "T":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError


def curve(
    points: list[tuple[int, float | None]], max_points: int = POINTS
) -> tuple[list[int], list[float | None]]:
    """At most `max_points` points: means of equal spans at their last x; None if none is finite."""
    span = -(-len(points) // max_points) if points else 1
    x, y = [], []
    for start in range(0, len(points), span):
        values = [value for _, value in points[start : start + span] if value is not None]
        x.append(points[min(start + span, len(points)) - 1][0])
        y.append(sum(values) / len(values) if values else None)
    return x, y
