"""A thread beside the loop: shows that this rank lives, renews the run's lease, and ends a rank
that is stuck.

A rank that stops (kill -STOP, a dead GPU, a storage that does not answer) leaves its peers inside a
collective. Each rank writes its place and a beat to a small file; when it has not moved for the
limit, it says whose beat has stopped, or who is furthest behind, writes the stacks of its threads,
and leaves with a code that asks for a restart.
Cost: a file of 512 bytes per rank, overwritten every few seconds.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.run import RunFiles
from train.phases import LONG_PATIENCE, PHASES
from train.resilience.incidents import HUNG, Incidents
from train.resilience.run_lock import RENEW_SECONDS, RunLock, machine, process_start

SIZE = 512


class Watchdog:
    """The watchdog of one rank."""

    def __init__(self, folder: Path, rank: int, world_size: int, hang_seconds: float) -> None:
        self.heartbeats = RunFiles(folder).heartbeats
        self.rank = rank
        self.world_size = world_size
        self.limit = hang_seconds
        self.period = min(RENEW_SECONDS, hang_seconds / 4)
        self.run_lock: RunLock | None = None
        self.incidents = Incidents(folder)
        self.beats = 0
        self.ended = threading.Event()
        self.who = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
        self.who["start"] = process_start(os.getpid())
        self.descriptor = -1
        self.at(0, "start", LONG_PATIENCE)

    def at(self, step: int, phase: str, patience: float = 1.0) -> None:
        """The loop has come this far; the next move may take `patience` times the limit."""
        self.place = (step, phase, time.monotonic() + patience * self.limit)

    def begin(self, run_lock: RunLock | None) -> None:
        """Start to beat; the first rank renews the lease."""
        self.run_lock = run_lock
        self.heartbeats.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self._path(self.rank), os.O_CREAT | os.O_WRONLY, 0o644)
        self._beat()
        threading.Thread(target=self._work, name="watchdog", daemon=True).start()

    def end(self) -> None:
        """Stop to watch, and leave no sign of life behind."""
        self.ended.set()
        if self.descriptor >= 0:
            with suppress(OSError):
                self._path(self.rank).unlink()

    def host(self, rank: int) -> str:
        """Where a rank runs, for messages."""
        return str(self._read(rank).get("host", "an unknown host"))

    def _path(self, rank: int) -> Path:
        return self.heartbeats / f"rank-{rank:05d}.json"

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._path(rank).read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):
            return {}

    def _work(self) -> None:
        while not self.ended.wait(self.period):
            self._beat()
            if self.run_lock is not None and not self.run_lock.renew():
                self._exit("lost run lock", "another job took over this run's folder", [])
            if time.monotonic() > self.place[2]:
                self._hang()

    def _beat(self) -> None:
        """Overwrite this rank's file in place, which needs no room on a full disk."""
        self.beats += 1
        step, phase, _ = self.place
        line = json.dumps({"step": step, "phase": phase, "beats": self.beats, **self.who})
        # peers would take this rank for silent, and say so; nothing else depends on it
        with suppress(OSError):
            os.pwrite(self.descriptor, line.ljust(SIZE).encode(), 0)

    def _hang(self) -> None:
        before = {rank: self._read(rank) for rank in range(self.world_size)}
        self.ended.wait(2.5 * self.period)
        self._beat()
        after = {rank: self._read(rank) for rank in range(self.world_size)}
        silent = [rank for rank in after if rank != self.rank and before[rank] == after[rank]]
        behind = min(after.values(), key=order)
        blamed = silent or [rank for rank, place in after.items() if order(place) == order(behind)]
        names = "; ".join(
            f"rank {rank} on {after[rank].get('host')} (step {after[rank].get('step')}, "
            f"{after[rank].get('phase')})"
            for rank in blamed
        )
        step, phase, _ = self.place
        state = "no heartbeat from" if silent else "furthest behind:"
        text = (
            f"rank {self.rank} made no progress for {self.limit:.0f} s (step {step}, {phase}); "
            f"{state} {names}"
        )
        self._exit("hang", text, [after[rank] for rank in silent])

    def _exit(self, kind: str, text: str, frozen: list[dict[str, Any]]) -> None:
        """Log it, write the stacks, end this machine's peers that cannot end themselves, exit."""
        self.incidents.log(kind, text, rank=self.rank)
        try:
            with (self.heartbeats / f"stacks-{self.rank:05d}.txt").open(
                "w", encoding="utf-8"
            ) as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        for peer in frozen:
            # a stopped process does not hear SIGTERM, and launchers wait half a minute before they
            # do the same
            if peer.get("machine") == machine() and process_start(peer["pid"]) == peer["start"]:
                os.kill(peer["pid"], signal.SIGKILL)
        exit_now(HUNG)


def order(place: dict[str, Any]) -> tuple[int, int]:
    """How far a rank has come."""
    phase = place.get("phase")
    return int(place.get("step", -1)), PHASES.index(phase) if phase in PHASES else -1


exit_now: Callable[[int], Any] = os._exit  # from a thread sys.exit would end the thread alone
