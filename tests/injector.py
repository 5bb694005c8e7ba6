"""Fault injection: patches the training code so that chosen faults occur in chosen ranks and steps.

A fault fires once, when its rank reaches its step. A file records that it has fired, so that it
does not fire again when a restarted run repeats the step.
"""

import ctypes
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

import train.checkpoint.writer as writer
from core.errors import InputError
from data.stream.loader import Loader
from tests.start_faults import START_FAULTS, damage
from train.config import RunConfig
from train.resilience import incidents
from train.resilience.failure_policy import FailurePolicy
from train.resilience.run_lock import RunLock
from train.resilience.watchdog import Watchdog
from train.trainer import Trainer

# these change losses by design, so the clean run of a comparison gets them too
NUMERIC = ("nan", "inf", "spike")
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGINT")
# These end a start. They fire one per start, in order: two at once would count as one.
ENDING = (
    *("kill", "kill in save", "checkpoint damaged", "stop", *SIGNALS, "update differs"),
    *("loader dies", "loader hangs", "storage hangs", "interpreter stuck", "weights flip"),
    *("outcome disk full", *START_FAULTS),
)
HANGS = ("stop", "loader hangs", "storage hangs", "interpreter stuck")
WRITE_POINTS = 16  # points of a save at which a kill can occur, on the first rank, which commits
PEER_POINTS = 6  # on the other ranks


@dataclass(frozen=True)
class Fault:
    """A fault: its kind, rank and step, counted from 0. `detail` is a point, a length or a seed."""

    kind: str
    rank: int
    step: int
    detail: int = 0

    @property
    def name(self) -> str:
        """Name of the file that records that the fault has fired."""
        return f"{self.kind}-{self.rank}-{self.step}-{self.detail}"


class Injector:
    """Patches the code of this process with the faults of one rank."""

    def __init__(self, faults: list[Fault], folder: Path, rank: int) -> None:
        self.folder = folder  # outside the run's folder
        self.faults = [fault for fault in faults if fault.rank == rank]
        # an armed one fires at this start, which another may then end
        self.pending = [
            f.name
            for f in faults
            if f.kind in ENDING and not (folder / f.name).exists() and not self.armed(f).exists()
        ]
        self.hangs = [
            folder / f.name for f in faults if f.kind in HANGS and not (folder / f.name).exists()
        ]
        self.rank = rank
        folder.mkdir(exist_ok=True)
        self.num_points = 0  # fault points passed
        self.full_until = -1
        self.slow_until = -1
        self.patch_training()
        self.patch_watchdog()

    def patch_watchdog(self) -> None:
        """Count the limit only after a hang, so that the watchdog ends no rank that is slow."""
        hangs = Watchdog._hangs

        def hangs_after_a_fault(watchdog: Watchdog) -> bool:
            if any(path.exists() for path in self.hangs):
                step, phase, _ = watchdog.progress
                watchdog.progress = (step, phase, 1.0)
                return hangs(watchdog)
            watchdog.idle_seconds = 0.0
            return False

        Watchdog._hangs = hangs_after_a_fault  # type: ignore[method-assign]

    def patch_training(self) -> None:
        """Wrap the step, the loader, the replica check and the functions of a save."""
        step = Trainer._step
        read = Loader.read

        def faulty_step(trainer: Trainer, *arguments: Any) -> Any:
            self.now = trainer.state.step
            if self.rank == 0:
                # one line per started step, repeated steps included
                with (self.folder / "steps").open("a") as file:
                    file.write(f"{self.now}\n")
            sequences = [
                sequence
                for batch, is_padding in arguments[1]
                if not is_padding
                for sequence in batch.tokens
            ]
            with (self.folder / f"samples-{self.rank}").open("a") as file:
                hashes = [hashlib.sha256(s.numpy().tobytes()).hexdigest()[:16] for s in sequences]
                file.write(f"{self.now} {' '.join(hashes)}\n")
            self.before_step(trainer)
            begin = time.process_time()
            result = step(trainer, *arguments)
            self.log_seconds(f"{self.now} {time.process_time() - begin}")
            return result

        def faulty_read(loader: Loader, *arguments: Any) -> Any:
            if self.fires("loader dies"):
                raise OSError(errno.EIO, "Input/output error (injected)")
            if self.fires("loader hangs"):
                time.sleep(3600)
            return read(loader, *arguments)

        update = FailurePolicy._checked_update

        def faulty_update(failure_policy: FailurePolicy, state: Any, lr: float, loss: float) -> Any:
            if self.fires("update differs"):
                failure_policy.engine.optimizer.register_step_pre_hook(triple_rate)
            return update(failure_policy, state, lr, loss)

        check = FailurePolicy.check_weights

        def faulty_check(failure_policy: FailurePolicy, step: int) -> None:
            if self.fires("weights flip"):  # just before it is compared
                weight = next(failure_policy.replica_check.model.parameters())
                weight.data.view(torch.int32).view(-1)[7] ^= 1 << 20
            check(failure_policy, step)

        self.now = -1
        FailurePolicy.check_weights = faulty_check  # type: ignore[method-assign]
        FailurePolicy._checked_update = faulty_update  # type: ignore[method-assign]
        Trainer._step = faulty_step  # type: ignore[method-assign]
        Loader.read = faulty_read  # type: ignore[method-assign]
        for name in (
            "write_tensors",
            "write_json",
            "fsync",
            "manifest_entry",
            "remove_checkpoint",
        ):
            setattr(writer, name, self.wrap(getattr(writer, name)))

    def log_seconds(self, step: str = "-") -> None:
        """Log processor seconds: of this process so far, and of a step after its number."""
        with (self.folder / f"seconds-{self.rank}").open("a") as file:
            file.write(f"{os.getpid()} {time.process_time()} {step}\n")

    def at_start(self, run: RunConfig) -> RunConfig:
        """Fire the armed fault of this start; returns the config that the rank starts with."""
        for fault in self.faults:
            path = self.folder / fault.name
            if self.armed(fault).exists() and not path.exists():
                self.mark(fault)
                return START_FAULTS[fault.kind](run, fault.detail, self.folder / "cache")
        return run

    def armed(self, fault: Fault) -> Path:
        """The file that lets a fault fire at the next start."""
        return self.folder / f"armed-{fault.name}"

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a fault point before and after it."""

        def wrapped(*arguments: Any) -> Any:
            self.fault_point()
            result = function(*arguments)
            self.fault_point()
            return result

        return wrapped

    def fault_point(self) -> None:
        """Fault point of a save: be killed, wait for a slow disk, or get a disk error."""
        self.num_points += 1
        if self.fires("slow disk"):
            time.sleep(2.0)
        for kind, number in (("disk full", errno.ENOSPC), ("disk error", errno.EIO)):
            if self.fires(kind):
                raise OSError(number, f"{os.strerror(number)} (injected)")
        for fault in self.due("kill in save"):
            num_points = WRITE_POINTS if self.rank == 0 else PEER_POINTS
            if self.num_points % num_points == fault.detail % num_points:
                self.mark(fault)
                os.kill(os.getpid(), signal.SIGKILL)

    def due(self, kind: str) -> list[Fault]:
        """Faults of a kind that have not fired and whose step is reached."""
        due = [f for f in self.faults if f.kind == kind and f.step <= self.now]
        if kind in ENDING:
            due = [f for f in due if f.name in self.pending[:1]]
        return [f for f in due if not (self.folder / f.name).exists()]

    def mark(self, fault: Fault) -> None:
        """Record that a fault fires now."""
        (self.folder / fault.name).touch()

    def fires(self, kind: str) -> Fault | None:
        """The next due fault of a kind, which is marked; None if there is none."""
        for fault in self.due(kind):
            self.mark(fault)
            return fault
        return None

    def before_step(self, trainer: Trainer) -> None:
        """Fire the faults that occur between two steps."""
        if self.fires("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fires("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fires("storage hangs"):
            self.hang_storage(trainer)
        if self.fires("interpreter stuck"):
            ctypes.PyDLL(None).pause()  # keeps the interpreter lock, unlike CDLL
        for kind in SIGNALS:
            if self.fires(kind):
                for _ in range(3):
                    os.kill(os.getpid(), signal.Signals[kind])
        if fault := self.fires("outcome disk full"):
            full_disk(incidents, "write_json")
            os.kill(os.getpid(), signal.SIGTERM)
        if fault := self.fires("incident disk full"):
            full_disk(incidents, "append_json_line")
            trainer.failure_policy.watchdog.incidents.log("note", "the disk is full")
        for fault in self.faults:
            if fault.kind in START_FAULTS and fault in self.due(fault.kind):
                self.armed(fault).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        for fault in self.due("checkpoint damaged"):
            trainer.checkpoints.writer.wait()
            if damage(trainer.checkpoints.folder, fault.detail):
                self.mark(fault)
                os.kill(os.getpid(), signal.SIGKILL)
        if fault := self.fires("slow"):
            self.slow_until = self.now + fault.detail
        if fault := self.fires("log disk full"):
            self.full_until = self.now + fault.detail
            self.patch_metrics(trainer)
        if fault := self.fires("clock jumps"):
            seconds = 3600.0 if fault.detail % 2 else -3600.0
            original_time = time.time
            time.time = lambda: original_time() + seconds
        if self.fires("second job"):
            try:
                RunLock(trainer.checkpoints.folder.parent).acquire()
            except InputError:
                return
            raise AssertionError("a second job took the run's folder")
        self.patch_forward(trainer)

    def patch_metrics(self, trainer: Trainer) -> None:
        """Fail writes to metrics.jsonl until the step `full_until`."""
        if trainer.metrics is None:
            return
        sink = trainer.metrics.file
        append = sink._append

        def faulty_append(line: bytes) -> None:
            if self.now < self.full_until:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(line)

        sink._append = faulty_append  # type: ignore[method-assign]

    def hang_storage(self, trainer: Trainer) -> None:
        """Block for ever what touches the run's folder: heartbeats, saves and the step's log."""

        def hang(*arguments: Any) -> None:
            time.sleep(3600)

        Watchdog._write_heartbeat = hang  # type: ignore[method-assign]
        RunLock.renew = hang  # type: ignore[method-assign,assignment]
        writer.write_tensors = hang  # type: ignore[assignment]
        if trainer.metrics is not None:
            trainer.metrics.file._append = hang  # type: ignore[method-assign]

    def patch_forward(self, trainer: Trainer) -> None:
        """Patch the forward pass: NaN, infinite or large losses, and slow passes.

        These are not marked as fired, since the clean run has them too.
        """
        values = {"nan": float("nan"), "inf": float("inf"), "spike": 3.0}
        factors = [
            values[f.kind]
            for f in self.faults
            if f.kind in NUMERIC and f.step <= self.now < f.step + f.detail
        ]
        model = trainer.model
        if not hasattr(model, "original_forward"):
            model.original_forward = model.forward
        forward: Any = model.original_forward

        def faulty_forward(*arguments: Any) -> Any:
            started_at = time.monotonic()
            losses, log_sums = forward(*arguments)
            if self.now < self.slow_until:  # relative, so that load does not hide it
                time.sleep(0.05 + 4 * (time.monotonic() - started_at))
            return losses * factors[0] if factors else losses, log_sums

        model.forward = faulty_forward


def triple_rate(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    """A hook that lets an optimizer update with three times its rate."""
    for group in optimizer.param_groups:
        group["lr"] *= 3


def full_disk(module: Any, name: str) -> None:
    """Let a function that writes find the disk full."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setattr(module, name, fail)


def samples(folder: Path, world: int) -> dict[int, list[str]]:
    """Hashes of the sequences of each step over all ranks; a repeated step counts its last time."""
    steps: dict[int, dict[int, list[str]]] = {}
    for rank in range(world):
        path = folder / f"samples-{rank}"
        for line in path.read_text().splitlines() if path.is_file() else ():
            step, *hashes = line.split()
            steps.setdefault(int(step), {})[rank] = hashes
    return {
        step: sorted(entry for hashes in ranks.values() for entry in hashes)
        for step, ranks in steps.items()
    }
