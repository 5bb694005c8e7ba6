"""Console of a run: lines in a log, or rows below a progress bar in a terminal."""

import logging
import time

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from core.units import end_time, short
from train.metrics.records import Record
from train.metrics.throughput import Throughput

logger = logging.getLogger(__name__)

LOG_COLUMNS = 118


class StepText:
    """Texts about the last step, for both consoles."""

    def __init__(self, total: int, throughput: Throughput) -> None:
        self.total = total
        self.throughput = throughput
        self.num_skipped = 0

    def add(self, record: Record) -> None:
        """Count the step of a record."""
        self.num_skipped += bool(record["skipped"])

    def step(self, record: Record) -> list[str]:
        """Step, loss, learning rate and gradient norm."""
        return [
            f"step {record['step']:,}",
            f"loss {record['loss']:.3f}",
            f"lr {record['lr']:.1e}",
            f"grad {record['grad_norm']:.2f}",
        ]

    def rate(self, record: Record) -> list[str]:
        """Tokens per second, MFU if known, and the time at which the run ends at this rate."""
        rate = self.throughput.tokens_per_second
        mfu = self.throughput.mfu
        return [
            f"{short(rate)} tok/s",
            *([] if mfu is None else [f"MFU {mfu:.0%}"]),
            f"ends {end_time((self.total - record['tokens']) / max(rate, 1e-9))}",
        ]

    def position(self, record: Record) -> list[str]:
        """Tokens so far, and the batch as sequences x tokens."""
        return [
            f"{short(record['tokens'])} of {short(self.total)} tokens",
            f"batch {record['batch']:,} x {record['seq_len']:,}",
        ]

    def details(self) -> list[str]:
        """Tokens per second of one rank, data wait, and updates skipped since this start."""
        return [
            f"{short(self.throughput.tokens_per_second / self.throughput.ranks)} tok/s/rank",
            f"data wait {self.throughput.data_wait:.1%}",
            f"skipped {self.num_skipped}",
        ]


def wrap(texts: list[str], columns: int = LOG_COLUMNS) -> list[str]:
    """Lines of at most `columns` columns with the texts in order, two spaces between them."""
    lines = [texts[0]]
    for text in texts[1:]:
        if len(lines[-1]) + 2 + len(text) <= columns:
            lines[-1] += f"  {text}"
        else:
            lines.append(text)
    return lines


class PlainConsole:
    """A log line every `seconds`; every STATUS_LINES lines also the status of the run.

    A new stage or context length shows the status too.
    """

    STATUS_LINES = 10

    def __init__(self, total: int, throughput: Throughput, seconds: float) -> None:
        self.text = StepText(total, throughput)
        self.seconds = seconds  # between two lines
        self.next_time = 0.0
        self.num_lines = 0
        self.stage: tuple[str, int] | None = None  # name and seq_len of the last line

    def show(self, record: Record, checkpoints: str) -> None:
        """Log the record if `seconds` have passed since the last line or the run is complete."""
        self.text.add(record)
        if time.monotonic() < self.next_time and record["tokens"] < self.text.total:
            return
        self.next_time = time.monotonic() + self.seconds
        progress = f"{record['tokens'] / self.text.total:6.1%}"
        texts = [record["stage"], progress, *self.text.step(record), *self.text.rate(record)]
        stage = (record["stage"], record["seq_len"])
        lines = wrap(texts)
        if self.num_lines % self.STATUS_LINES == 0 or stage != self.stage:
            status = [*self.text.position(record), *self.text.details(), checkpoints]
            lines += [f"  {line}" for line in wrap(status, LOG_COLUMNS - 2)]
        self.num_lines += 1
        self.stage = stage
        logger.info("\n".join(lines))

    def close(self) -> None:
        """Do nothing: all lines are written."""


class LiveConsole:
    """A progress bar with the last step below it, for terminals; every row fits 80 columns."""

    def __init__(self, total: int, throughput: Throughput) -> None:
        columns = (
            TextColumn("{task.description:>10}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
        )
        self.text = StepText(total, throughput)
        self.progress = Progress(*columns)
        self.task = self.progress.add_task("starting", total=total)
        self.rows = [Text("", no_wrap=True, overflow="ellipsis") for _ in range(4)]
        self.live = Live(Group(self.progress, *self.rows), refresh_per_second=4)
        self.live.start()

    def show(self, record: Record, checkpoints: str) -> None:
        """Update the bar and the rows."""
        self.text.add(record)
        self.progress.update(self.task, completed=record["tokens"], description=record["stage"])
        per_rank, data_wait, skipped = self.text.details()
        rows = (
            [*self.text.step(record), skipped],
            [*self.text.rate(record), per_rank, data_wait],
            self.text.position(record),
            [checkpoints],
        )
        for row, texts in zip(self.rows, rows, strict=True):
            row.plain = "  ".join(texts)

    def close(self) -> None:
        """Stop the updates; the last rows stay on the screen."""
        self.live.stop()
