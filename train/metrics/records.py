"""metrics.jsonl: a record per step, per scored checkpoint, and of initial weights.

A record of scores has the step and tokens of its checkpoint and the scores by suite. It is written
when the scores arrive, after records of later steps. A run that began with loaded weights has a
record of their held-out losses before the first step. A line that is damaged is reported and stays
in the file, but no reader takes it.
"""

import errno
import hashlib
import json
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NotRequired

from pydantic import Discriminator, Tag
from typing_extensions import TypedDict

from core.errors import InputError
from core.files import ends_line, write_atomic
from core.ranges import Finite, Whole
from core.records import BLOCKED, Damage, parse_typed, read_typed_lines, scan_lines
from core.run import RunFiles

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Span = tuple[int, int]  # first byte, and the byte after the last
POINTS = 2000  # of a curve on the page; more points are averaged, which bounds the page size
COPY_BYTES = 2**20


class SourceValidation(TypedDict):
    """Held-out loss of a source, in nats per token."""

    loss: Finite | None
    bits_per_byte: NotRequired[Finite | None]


class StepRecord(TypedDict):
    """A step's line; null stands for a number that was not finite.

    Required keys are those of every version, which readers of a run's curves index.
    """

    step: Whole
    tokens: Whole
    loss: Finite | None
    grad_norm: Finite | None
    skipped: bool
    stage: str
    source_loss: dict[str, Finite | None]
    lr: NotRequired[Finite]
    batch: NotRequired[Whole]
    seq_len: NotRequired[Whole]
    step_seconds: NotRequired[Finite]
    data_wait_seconds: NotRequired[Finite]
    source_tokens: NotRequired[dict[str, Whole]]
    tokens_per_second: NotRequired[Finite | None]
    mfu: NotRequired[Finite | None]
    memory_gib: NotRequired[Finite | None]
    validation: NotRequired[dict[str, SourceValidation]]


class ScoresRecord(TypedDict):
    """The line of a scored checkpoint."""

    step: Whole
    tokens: Whole
    scores: dict[str, dict[str, Finite | None]]  # suite -> row


class InitialRecord(TypedDict):
    """The line of weights that were loaded, scored before the first step."""

    step: Whole  # 0, as are the tokens
    tokens: Whole
    initial_validation: dict[str, SourceValidation]


def _kind(line: Any) -> str:
    """The key that only this kind of line has; a step's has none."""
    kinds = ("scores", "initial_validation")
    return next((kind for kind in kinds if isinstance(line, dict) and kind in line), "")


LINE: Any = Annotated[
    Annotated[StepRecord, Tag("")]
    | Annotated[ScoresRecord, Tag("scores")]
    | Annotated[InitialRecord, Tag("initial_validation")],
    Discriminator(_kind),
]


class JsonLines:
    """A JSON Lines file without duplicates across restarts: a start cuts off later records.

    While the disk is full, up to MAX_WAITING lines wait in memory and are written later; a
    checkpoint takes those that still wait.
    """

    MAX_WAITING = 100_000

    def __init__(
        self, path: Path, tokens: int | None, report: Callable[[str], None] = logger.warning
    ) -> None:
        """Open for appending; cut off records after `tokens`, unless it is None.

        Damaged lines are reported by `report`. Raises InputError if the file cannot be opened.
        """
        self.path = path
        if tokens is not None:
            cut_off(path, tokens, report)
        try:
            self.file = path.open("a+b", buffering=0)
        except BLOCKED as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): move it away or fix its permissions"
            ) from error
        self.prefix = b"" if ends_line(self.file) else b"\n"  # a kill has cut the last line
        self.end = self.file.tell()
        self.is_torn = False  # the file has part of a line after `end`
        self.failed = False
        self.lost = 0  # records that had no room in memory
        self.waiting: deque[bytes] = deque()
        self.lock = threading.Lock()

    def write(self, record: Record) -> None:
        """Append a record; NaN and infinity, which JSON lacks, become null."""
        with self.lock:  # a save reads the lines in a thread of its own
            if not self.waiting:
                self.failed = False
            if len(self.waiting) == self.MAX_WAITING:
                self.waiting.popleft()
                self.lost += 1
            self.waiting.append(json.dumps(finite(record)).encode() + b"\n")
            try:
                while self.waiting:
                    self._append(self.prefix + self.waiting[0])
                    self.prefix = b""
                    self.waiting.popleft()
            except OSError as error:
                if not self.failed:
                    logger.warning(
                        f"cannot write {self.path.name} ({error}); records wait in memory"
                    )
                self.failed = True

    def unwritten(self) -> list[str]:
        """The lines that wait."""
        with self.lock:
            return [line.decode().rstrip("\n") for line in self.waiting]

    def _append(self, line: bytes) -> None:
        """Write the complete line, or restore the length of the file and raise OSError."""
        if self.is_torn:
            self._restore()
        written = self.file.write(line)
        if written != len(line):  # the disk filled up within the line
            self.is_torn = True
            self._restore()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.end += written

    def _restore(self) -> None:
        self.file.truncate(self.end)
        self.is_torn = False

    def close(self) -> None:
        """Sync and close the file."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            logger.warning(f"cannot sync {self.path.name}: {error}")
        with suppress(OSError):
            self.file.close()
        if self.waiting:
            logger.warning(
                f"{len(self.waiting)} lines of {self.path.name} had no room; those up to a "
                "checkpoint are in its state.json, and the next start writes them"
            )
        if self.lost:
            logger.warning(f"lost {self.lost} lines of {self.path.name}")


def restore(path: Path, lines: Iterable[str], tokens: int) -> None:
    """Append the lines up to `tokens` that a checkpoint took, unless the file has them now."""
    missing = {
        f"{line}\n".encode(): None
        for line in lines
        if parse_typed(line, LINE, "unwritten line of a checkpoint", "allow")["tokens"] <= tokens
    }
    with path.open("a+b") as file:
        file.seek(0)
        for present in file:
            missing.pop(present, None)
        if missing:
            file.writelines([b"" if ends_line(file) else b"\n", *missing])


def cut_off(path: Path, tokens: int, report: Callable[[str], None] = logger.warning) -> None:
    """Move the records after `tokens`, which will be written again, to a file beside it.

    At 0 tokens that is every record, also that of initial weights. All other bytes stay, also
    damaged lines, which are reported. The cut records are durable before the file is replaced; a
    start after a crash in between cuts the same bytes to the same name.
    """
    damage = Damage(path)
    cut: list[Span] = []
    for start, end, record in scan_lines(path, LINE, damage):
        if record["tokens"] > tokens or tokens == 0:
            adjacent = bool(cut) and cut[-1][1] == start
            cut[-1:] = [(cut[-1][0], end)] if adjacent else [*cut[-1:], (start, end)]
    damage.report(report)
    if not cut:
        return
    with path.open("rb") as file:
        edges = [0, *(edge for span in cut for edge in span), path.stat().st_size]
        kept = list(zip(edges[::2], edges[1::2], strict=True))
        digest = hashlib.sha256()
        for block in _blocks(file, cut):
            digest.update(block)
        beside = RunFiles(path.parent).cut_metrics(tokens, digest.hexdigest())
        write_atomic(beside, lambda out: out.writelines(_blocks(file, cut)))
        write_atomic(path, lambda out: out.writelines(_blocks(file, kept)))
    logger.info(f"records after {tokens:,} tokens, which follow again, are now in {beside.name}")


def _blocks(file: BinaryIO, spans: list[Span]) -> Iterator[bytes]:
    """Yield the bytes of spans of a file, in blocks."""
    for start, end in spans:
        file.seek(start)
        while start < end and (block := file.read(min(COPY_BYTES, end - start))):
            start += len(block)
            yield block


def is_step(record: Record) -> bool:
    """Whether a record is that of a step."""
    return not _kind(record)


def read_lines(path: Path) -> list[Record]:
    """Records of steps in a metrics file."""
    return [record for record in read_typed_lines(path, LINE) if is_step(record)]


def read_initial(path: Path) -> dict[str, SourceValidation]:
    """Held-out losses of the weights that a run began with; empty for random weights."""
    records = (record for record in read_typed_lines(path, LINE))
    return next((r["initial_validation"] for r in records if "initial_validation" in r), {})


def read_scores(path: Path) -> list[Record]:
    """Records of scores in a metrics file, ordered by tokens."""
    return sorted(
        (record for record in read_typed_lines(path, LINE) if "scores" in record),
        key=lambda record: record["tokens"],
    )


def finite(value: Any) -> Any:
    """The value with None in place of NaN and infinity, in nested dicts too."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
