"""Show a run's last step: a line now and then, or a progress bar in a terminal."""

import logging
import os
import time
from collections import deque

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from train.metrics.records import Record, short

logger = logging.getLogger(__name__)


def summary(record: Record) -> str:
    """One step in a line that fits a terminal of 80 columns."""
    return (
        f"step {record['step']} loss {record['loss']:.3f} lr {record['lr']:.1e} "
        f"batch {record['batch']}x{record['seq_len']} grad {record['grad_norm']:.2f} "
        f"{short(record['tokens_per_second'])} tok/s MFU {record['mfu']:.0%}"
    )


class Pace:
    """Totals and means of steps: skipped updates so far, recent waits for data, date of the end."""

    STEPS = 50  # that a pace is the mean of: one slow step must not move the date by weeks

    def __init__(self, total: int) -> None:
        self.total = total
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.skipped = 0
        self.recent: deque[tuple[float, float, float]] = deque(maxlen=self.STEPS)

    def add(self, record: Record) -> None:
        """Take a step in."""
        self.skipped += bool(record["skipped"])
        tokens = record["tokens_per_second"] * record["step_seconds"]
        self.recent.append((tokens, record["step_seconds"], record["data_wait_seconds"]))

    def line(self, record: Record) -> str:
        """Tokens in all, pace per rank, waits, skips and the end, in a line of 80 columns."""
        tokens, seconds, waited = (sum(column) for column in zip(*self.recent, strict=True))
        rate = max(tokens / max(seconds, 1e-9), 1e-9)
        return (
            f"{short(record['tokens'])} of {short(self.total)} tokens, "
            f"{short(rate / self.ranks)} tok/s/rank, data wait "
            f"{waited / max(seconds, 1e-9):.0%}, skipped {self.skipped}, ends "
            f"{date((self.total - record['tokens']) / rate)}"
        )


def date(seconds: float) -> str:
    """The minute that lies so many seconds ahead, in UTC."""
    end = time.time() + min(seconds, 1e9)  # a stalled run has no date, and the calendar an end
    return time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(end))


class PlainConsole:
    """A line now and then, for logs."""

    def __init__(self, total: int, seconds: float) -> None:
        self.pace = Pace(total)
        self.seconds = seconds
        self.next = 0.0

    def show(self, record: Record, saves: str) -> None:
        """Print the record when enough time has passed, and always the last one."""
        self.pace.add(record)
        if time.monotonic() >= self.next or record["tokens"] >= self.pace.total:
            self.next = time.monotonic() + self.seconds
            share = record["tokens"] / self.pace.total
            line = (
                f"{record['stage']:>8} {share:6.1%}  {summary(record)}  "
                f"{self.pace.line(record)}, {saves}"
            )
            logger.info(line)

    def close(self) -> None:
        """Nothing is held."""


class LiveConsole:
    """A progress bar with the last step under it, for terminals."""

    def __init__(self, total: int) -> None:
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        self.pace = Pace(total)
        self.progress = Progress(*columns)
        self.task = self.progress.add_task("starting", total=total)
        self.last = Text("", no_wrap=True)
        self.far = Text("", no_wrap=True)
        self.saves = Text("", no_wrap=True)
        self.live = Live(
            Group(self.progress, self.last, self.far, self.saves), refresh_per_second=4
        )
        self.live.start()

    def show(self, record: Record, saves: str) -> None:
        """Move the bar and replace the lines."""
        self.pace.add(record)
        self.progress.update(self.task, completed=record["tokens"], description=record["stage"])
        self.last.plain = summary(record)
        self.far.plain = self.pace.line(record)
        self.saves.plain = saves

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.live.stop()
