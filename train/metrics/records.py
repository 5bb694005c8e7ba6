"""metrics.jsonl: one record per step, the numbers of a run, and one for each checkpoint whose
scores came in.

A record of scores (step, tokens, scores by suite) stands where the run was when they came, with the
step and the tokens of the checkpoint that they belong to.
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
# of a curve on a page; longer runs are averaged over so many spans, or the page would grow with
# them
POINTS = 2000


class JsonLines:
    """One JSON object per line, in the order of tokens, without duplicates across restarts.

    A disk that is full for a while costs no record: lines wait in memory, up to a bound, and are
    written later.
    """

    WAITING = 100_000

    def __init__(self, path: Path, tokens: int) -> None:
        kept = [line for line in read_json_lines(path) if line["tokens"] <= tokens]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.end = path.stat().st_size
        self.waiting: deque[bytes] = deque(maxlen=self.WAITING)

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
        """Write a whole line, or leave the file as it was."""
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
    """Records of a metrics file's steps, or all of another's; drops a last line cut by a kill."""
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
    points: list[tuple[int, float | None]], most: int = POINTS
) -> tuple[list[int], list[float | None]]:
    """At most `most` points, each a span's mean, placed at its end; None if no value is finite."""
    span = -(-len(points) // most) if points else 1
    x, y = [], []
    for start in range(0, len(points), span):
        values = [value for _, value in points[start : start + span] if value is not None]
        x.append(points[min(start + span, len(points)) - 1][0])
        y.append(sum(values) / len(values) if values else None)
    return x, y
