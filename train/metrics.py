"""Where the numbers of a run go: metrics.jsonl, the console, and W&B when there is one.

The file is the record; the others are views of it and can neither delay nor stop the run.
"""

import errno
import hashlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from train.config import MetricsConfig

Record = dict[str, Any]


class Metrics:
    """All sinks of one run; only its first rank makes one."""

    def __init__(
        self, folder: Path, name: str, config: MetricsConfig, run_config: Record, tokens: int, total: int
    ) -> None:
        """`tokens` is where the run goes on: records of a lost future behind it are dropped. `total` ends the run."""
        self.file = JsonLines(folder / "metrics.jsonl", tokens)
        self.console = LiveConsole(total) if sys.stdout.isatty() else PlainConsole(total, config.console_seconds)
        project = config.wandb_project
        self.wandb = Wandb(project, name, folder, run_config) if project is not None else None

    def log(self, record: Record) -> None:
        """Write one step's record everywhere."""
        self.file.write(record)
        with suppress(OSError):  # standard output may go to a full disk
            self.console.show(record)
        if self.wandb is not None:
            self.wandb.log(record)

    def close(self) -> None:
        """Flush and stop every sink."""
        self.file.close()
        self.console.close()
        if self.wandb is not None:
            self.wandb.close()


class JsonLines:
    """One JSON object per line, in the order of tokens, without duplicates across restarts.

    A disk that is full for a while costs no record: lines wait in memory, up to a bound, and are written later.
    """

    WAITING = 100_000

    def __init__(self, path: Path, tokens: int) -> None:
        kept = [line for line in read_lines(path) if line["tokens"] <= tokens]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        part.rename(path)
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
                print(f"warning: metrics.jsonl cannot be written ({error}); its lines wait in memory", flush=True)
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
            print(f"warning: the last {len(self.waiting)} lines of metrics.jsonl are lost", flush=True)


def read_lines(path: Path) -> list[Record]:
    """The records of a metrics file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def finite(value: Any) -> Any:
    """The same value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(record: Record) -> str:
    """One step in a line that fits a terminal of 80 columns."""
    return (
        f"step {record['step']} loss {record['loss']:.3f} lr {record['lr']:.1e} "
        f"batch {record['batch']}x{record['seq_len']} grad {record['grad_norm']:.2f} "
        f"{short(record['tokens_per_second'])} tok/s MFU {record['mfu']:.0%}"
    )


def short(count: float) -> str:
    """A count with three digits and a unit: 1.8M, 5.8T."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 1000 or unit == "T":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError


class Pace:
    """What single steps do not tell: skipped updates so far, recent waits for data, and the date of the end."""

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
        """Tokens of all, pace per rank, waits, skips and the end, in a line that fits 80 columns."""
        tokens, seconds, waited = (sum(column) for column in zip(*self.recent, strict=True))
        rate = max(tokens / max(seconds, 1e-9), 1e-9)
        return (
            f"{short(record['tokens'])} of {short(self.total)} tokens, {short(rate / self.ranks)} tok/s/rank, "
            f"data wait {waited / max(seconds, 1e-9):.0%}, skipped {self.skipped}, "
            f"ends {date((self.total - record['tokens']) / rate)}"
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

    def show(self, record: Record) -> None:
        """Print the record when enough time has passed, and always the last one."""
        self.pace.add(record)
        if time.monotonic() >= self.next or record["tokens"] >= self.pace.total:
            self.next = time.monotonic() + self.seconds
            share = record["tokens"] / self.pace.total
            print(f"{record['stage']:>8} {share:6.1%}  {summary(record)}  {self.pace.line(record)}", flush=True)

    def close(self) -> None:
        """Nothing is held."""


class LiveConsole:
    """A progress bar with the last step under it, for terminals."""

    def __init__(self, total: int) -> None:
        columns = (TextColumn("{task.description:>10}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.pace = Pace(total)
        self.progress = Progress(*columns)
        self.task = self.progress.add_task("starting", total=total)
        self.last = Text("", no_wrap=True)
        self.far = Text("", no_wrap=True)
        self.live = Live(Group(self.progress, self.last, self.far), refresh_per_second=4)
        self.live.start()

    def show(self, record: Record) -> None:
        """Move the bar and replace the lines."""
        self.pace.add(record)
        self.progress.update(self.task, completed=record["tokens"], description=record["stage"])
        self.last.plain = summary(record)
        self.far.plain = self.pace.line(record)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.live.stop()


class Wandb:
    """W&B in a thread of its own: whatever it does, the run neither waits nor fails.

    Online with WANDB_API_KEY in the environment, else offline into the run's folder; offline too when the server does
    not answer. The run id follows from the folder, so that a restarted run goes on in the same W&B run.
    """

    ANSWER_SECONDS = 15.0
    CLOSE_SECONDS = 15.0

    def __init__(self, project: str, name: str, folder: Path, run_config: Record) -> None:
        digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        run_id = re.sub(r"[^A-Za-z0-9_-]", "-", f"{name}-{digest}")
        self.settings = {"project": project, "name": name, "id": run_id, "dir": str(folder)}
        self.run_config = run_config
        self.queue: queue.Queue[Record | None] = queue.Queue(100_000)
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, record: Record) -> None:
        """Hand a record over; when the thread is stuck or dead and the queue full, it is in metrics.jsonl still."""
        if self.thread.is_alive() and not self.queue.full():
            self.queue.put_nowait(record)

    def close(self) -> None:
        """Let the thread finish, for a bounded time."""
        self.queue.put(None, timeout=1) if not self.queue.full() else None
        self.thread.join(self.CLOSE_SECONDS)
        if self.thread.is_alive():
            print("warning: W&B is still busy and is left behind; metrics.jsonl is complete", flush=True)

    def _work(self) -> None:
        try:
            import wandb

            run = self._start(wandb)
            run.define_metric("*", step_metric="tokens")  # runs of other batches are compared by what they have read
            while (record := self.queue.get()) is not None:
                run.log(grouped(finite(record)), step=record["step"])
            run.finish()
            wandb.teardown()  # finish does not wait for the service's last write; the end of its process does
        except Exception as error:  # whatever W&B raises must not reach the run; the message says what is lost
            print(f"warning: W&B is off ({type(error).__name__}: {error}); metrics.jsonl is complete", flush=True)

    def _start(self, wandb: Any) -> Any:
        settings = wandb.Settings(init_timeout=self.ANSWER_SECONDS, console="off", silent=True)
        arguments: Record = {**self.settings, "config": self.run_config, "resume": "allow", "settings": settings}
        if not os.environ.get("WANDB_API_KEY"):
            return wandb.init(mode="offline", **arguments)
        try:
            return wandb.init(mode="online", **arguments)
        except Exception as error:  # unreachable, refused or timed out: keep the numbers for a later `wandb sync`
            print(f"warning: W&B does not answer ({type(error).__name__}); it goes on offline", flush=True)
            wandb.teardown()  # its service still holds the id of the run that failed to start
            return wandb.init(mode="offline", **arguments)


def flatten(record: Record, prefix: str = "") -> Record:
    """Nested records with slashes in their keys, as W&B groups them."""
    flat: Record = {}
    for key, value in record.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat


SECTIONS = {
    "schedule": ("lr", "batch", "seq_len", "stage"),
    "health": ("grad_norm", "skipped", "memory_gib"),
    "speed": ("tokens_per_second", "mfu", "step_seconds", "data_wait_seconds"),
}
GROUPS = {"loss": "loss/all", "source_loss": "loss"} | {
    key: f"{section}/{key}" for section, keys in SECTIONS.items() for key in keys
}


def grouped(record: Record) -> Record:
    """A record with the keys that W&B shows as panels in sections; step and tokens stay, for they are axes."""
    return flatten({GROUPS.get(key, key): value for key, value in record.items()})
