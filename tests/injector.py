"""Faults at chosen places of a run, each once: what breaks on a cluster, done to the real code from
outside it.

A fault fires in the rank it names, when the run has reached its step. That it has fired is a file,
so that the run, which comes past the same step again after a restart, meets it once.
"""

import errno
import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import train.checkpoint.writer as commit
from core.errors import InputError
from core.run import iter_checkpoints
from data.stream.loader import Loader
from train.resilience.failure_policy import FailurePolicy
from train.resilience.run_lock import RunLock
from train.resilience.watchdog import Watchdog
from train.trainer import Trainer

# change the run's course by design, so a clean run to compare with gets them too
NUMERIC = ("nan", "inf", "spike")
# They end a start. Each has one of its own, in their order, however slow the machine: two at once
# would be one.
ENDING = (
    *("kill", "kill in save", "checkpoint damaged", "stop", "SIGTERM", "SIGUSR1"),
    *("loader dies", "loader hangs", "weights flip"),
)
HANGS = ("stop", "loader hangs")
WRITE_POINTS = 18  # places of one save where a kill can fall: in the first rank, which commits
PEER_POINTS = 8  # and in another


@dataclass(frozen=True)
class Fault:
    """One fault: what, in which rank, before which step counted from 0; `detail` picks a place or a
    length.
    """

    kind: str
    rank: int
    step: int
    detail: int = 0

    @property
    def name(self) -> str:
        """Names the file that says it has fired."""
        return f"{self.kind}-{self.rank}-{self.step}-{self.detail}"


class Injector:
    """Puts the faults of one rank into the code that it is about to run."""

    def __init__(self, faults: list[Fault], folder: Path, rank: int) -> None:
        self.faults = [fault for fault in faults if fault.rank == rank]
        self.waiting = [
            f.name for f in faults if f.kind in ENDING and not (folder / f.name).exists()
        ]
        self.hangs = [
            folder / f.name for f in faults if f.kind in HANGS and not (folder / f.name).exists()
        ]
        self.folder = folder  # beside the run's, not inside
        self.rank = rank
        folder.mkdir(exist_ok=True)
        self.points = 0
        self.full_until = -1
        self.slow_until = -1
        self.patched()
        self.patient()

    def patient(self) -> None:
        """Let the watchdog's limit count from a hang on: a slow machine does not end a rank."""
        at, beat = Watchdog.enter_phase, Watchdog._write_heartbeat

        def moved(watchdog: Watchdog, step: int, phase: str, patience: float = 1.0) -> None:
            at(watchdog, step, phase, 1e6)

        def beating(watchdog: Watchdog) -> None:
            beat(watchdog)
            if any(path.exists() for path in self.hangs):
                step, phase, end = watchdog.progress
                watchdog.progress = (step, phase, min(end, time.monotonic() + watchdog.limit))

        Watchdog.enter_phase, Watchdog._write_heartbeat = moved, beating  # type: ignore[method-assign]

    def patched(self) -> None:
        """Wrap a step, the loader and the points of a save."""
        step, read = Trainer._step, Loader.read

        def counted(trainer: Trainer, *arguments: Any) -> Any:
            self.now = trainer.state.step
            if self.rank == 0:
                # every step that is begun, the repeated ones too
                with (self.folder / "steps").open("a") as file:
                    file.write(f"{self.now}\n")
            rows = [
                row for batch, is_padding in arguments[1] if not is_padding for row in batch.tokens
            ]
            with (self.folder / f"samples-{self.rank}").open("a") as file:
                hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in rows]
                file.write(f"{self.now} {' '.join(hashes)}\n")
            self.before_step(trainer)
            return step(trainer, *arguments)

        def reading(loader: Loader, *arguments: Any) -> Any:
            if self.fires("loader dies"):
                raise OSError(errno.EIO, "Input/output error (injected)")
            if self.fires("loader hangs"):
                time.sleep(3600)
            return read(loader, *arguments)

        check = FailurePolicy.check_replicas

        def checked(failure_policy: FailurePolicy, step: int) -> None:
            if self.fires("weights flip"):  # before the next update would write the copy anew
                weight = next(failure_policy.model.parameters())
                weight.data.view(torch.int32).view(-1)[7] ^= 1 << 20
            check(failure_policy, step)

        self.now = -1
        FailurePolicy.check_replicas = checked  # type: ignore[method-assign]
        Trainer._step, Loader.read = counted, reading  # type: ignore[method-assign]
        for name in (
            "save_file",
            "write_json",
            "fsync_dir",
            "manifest_entry",
            "remove_checkpoint",
        ):
            setattr(commit, name, self.around(getattr(commit, name)))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a place for a fault before and after it."""

        def wrapped(*arguments: Any) -> Any:
            self.point()
            result = function(*arguments)
            self.point()
            return result

        return wrapped

    def point(self) -> None:
        """A place inside a save: die here, or find the disk full or broken."""
        self.points += 1
        if self.fires("slow disk"):
            time.sleep(2.0)
        for kind, number in (("disk full", errno.ENOSPC), ("disk error", errno.EIO)):
            if self.fires(kind):
                raise OSError(number, f"{os.strerror(number)} (injected)")
        for fault in self.due("kill in save"):
            places = WRITE_POINTS if self.rank == 0 else PEER_POINTS
            if self.points % places == fault.detail % places:
                self.mark(fault)
                os.kill(os.getpid(), signal.SIGKILL)

    def due(self, kind: str) -> list[Fault]:
        """Faults of a kind whose step is reached and that have not fired."""
        found = [f for f in self.faults if f.kind == kind and f.step <= self.now]
        if kind in ENDING:
            found = [f for f in found if f.name in self.waiting[:1]]
        return [f for f in found if not (self.folder / f.name).exists()]

    def mark(self, fault: Fault) -> None:
        """It happens now."""
        (self.folder / fault.name).touch()

    def fires(self, kind: str) -> Fault | None:
        """The next fault of a kind, marked."""
        for fault in self.due(kind):
            self.mark(fault)
            return fault
        return None

    def before_step(self, trainer: Trainer) -> None:
        """Everything that strikes between two steps."""
        if self.fires("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fires("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        for kind, number in (("SIGTERM", signal.SIGTERM), ("SIGUSR1", signal.SIGUSR1)):
            if self.fires(kind):
                for _ in range(3):
                    os.kill(os.getpid(), number)
        for fault in self.due("checkpoint damaged"):
            trainer.checkpoints.writer.wait()
            if damage(trainer.checkpoints.folder, fault.detail):
                self.mark(fault)
                os.kill(os.getpid(), signal.SIGKILL)
        if fault := self.fires("slow"):
            self.slow_until = self.now + fault.detail
        if fault := self.fires("log disk full"):
            self.full_until = self.now + fault.detail
            self.fill_log(trainer)
        if fault := self.fires("clock jumps"):
            jumped, real = 3600.0 * (1 if fault.detail % 2 else -1), time.time
            time.time = lambda: real() + jumped
        if self.fires("second job"):
            try:
                RunLock(trainer.checkpoints.folder.parent).acquire()
            except InputError:
                return
            raise AssertionError("a second job took the run's folder")
        self.numeric(trainer)

    def fill_log(self, trainer: Trainer) -> None:
        """metrics.jsonl finds no room until `full_until`."""
        if trainer.metrics is None:
            return
        sink = trainer.metrics.file
        append = sink._append

        def full(line: bytes) -> None:
            if self.now < self.full_until:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(line)

        sink._append = full  # type: ignore[method-assign]

    def numeric(self, trainer: Trainer) -> None:
        """Losses that are not finite or far too large, as in a clean run, so never marked; and slow
        forward passes.
        """
        values = {"nan": float("nan"), "inf": float("inf"), "spike": 3.0}
        factors = [
            values[f.kind]
            for f in self.faults
            if f.kind in NUMERIC and f.step <= self.now < f.step + f.detail
        ]
        model = trainer.model
        if not hasattr(model, "whole_forward"):
            model.whole_forward = model.forward
        forward: Any = model.whole_forward

        def wrong(*arguments: Any) -> Any:
            begun = time.monotonic()
            losses, log_sums = forward(*arguments)
            if self.now < self.slow_until:  # as many times slower under load as on an idle machine
                time.sleep(0.05 + 4 * (time.monotonic() - begun))
            return losses * factors[0] if factors else losses, log_sums

        model.forward = wrong


def samples(folder: Path, world: int) -> dict[int, list[str]]:
    """Hashes of the sequences that each step has trained on, over all ranks; of a repeated step,
    its last time.
    """
    steps: dict[int, dict[int, list[str]]] = {}
    for rank in range(world):
        path = folder / f"samples-{rank}"
        for line in path.read_text().splitlines() if path.is_file() else ():
            step, *hashes = line.split()
            steps.setdefault(int(step), {})[rank] = hashes
    return {
        step: sorted(one for hashes in ranks.values() for one in hashes)
        for step, ranks in steps.items()
    }


def damage(folder: Path, detail: int) -> bool:
    """Spoil a file of the newest checkpoint, if there is one: flip a bit, cut the end, or remove
    it.
    """
    best = next(iter_checkpoints(folder), None)
    if best is None:
        return False
    files = sorted(path for path in best.iterdir() if path.is_file())
    path = files[detail % len(files)]
    data = bytearray(path.read_bytes())
    how = detail // len(files) % 3
    if how == 0:
        data[detail * 7919 % len(data)] ^= 1 << (detail % 8)
        path.write_bytes(data)
    elif how == 1:
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    return True
