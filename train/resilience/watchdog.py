"""Watchdog thread of a rank: writes heartbeats, renews the run's lock, ends a rank that hangs.

A stopped rank (kill -STOP, a dead GPU, unresponsive storage) leaves its peers inside a collective.
Each rank writes its step, phase and a counter to a small file. A rank that makes no progress within
the limit reports the peer whose heartbeat stopped, or the one furthest behind, writes its threads'
stacks, and exits with a code that requests a restart.
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

HEARTBEAT_BYTES = 512


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
        self.num_heartbeats = 0
        self.stopped = threading.Event()
        self.process = {
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
        }
        self.descriptor = -1
        self.enter_phase(0, "start", LONG_PATIENCE)

    def enter_phase(self, step: int, phase: str, patience: float = 1.0) -> None:
        """Record progress; the phase may take `patience` times the limit."""
        self.progress = (step, phase, time.monotonic() + patience * self.limit)

    def start(self, run_lock: RunLock | None) -> None:
        """Start writing heartbeats; `run_lock` is renewed if given (first rank)."""
        self.run_lock = run_lock
        self.heartbeats.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self._path(self.rank), os.O_CREAT | os.O_WRONLY, 0o644)
        self._write_heartbeat()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop the thread and remove the heartbeat file."""
        self.stopped.set()
        if self.descriptor >= 0:
            with suppress(OSError):
                self._path(self.rank).unlink()

    def host(self, rank: int) -> str:
        """Return the host of a rank, for messages."""
        return str(self._read(rank).get("host", "an unknown host"))

    def _path(self, rank: int) -> Path:
        return self.heartbeats / f"rank-{rank:05d}.json"

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            heartbeat: dict[str, Any] = json.loads(self._path(rank).read_text(encoding="utf-8"))
            return heartbeat
        except (OSError, ValueError):
            return {}

    def _run(self) -> None:
        while not self.stopped.wait(self.period):
            self._write_heartbeat()
            if self.run_lock is not None and not self.run_lock.renew():
                self._exit("lost run lock", "another job took over this run's folder", [])
            if time.monotonic() > self.progress[2]:
                self._report_hang()

    def _write_heartbeat(self) -> None:
        """Overwrite this rank's file in place, which needs no free disk space."""
        self.num_heartbeats += 1
        step, phase, _ = self.progress
        line = json.dumps(
            {"step": step, "phase": phase, "beats": self.num_heartbeats, **self.process}
        )
        # on an error peers report this rank as silent; nothing else depends on the file
        with suppress(OSError):
            os.pwrite(self.descriptor, line.ljust(HEARTBEAT_BYTES).encode(), 0)

    def _report_hang(self) -> None:
        before = {rank: self._read(rank) for rank in range(self.world_size)}
        self.stopped.wait(2.5 * self.period)
        self._write_heartbeat()
        after = {rank: self._read(rank) for rank in range(self.world_size)}
        silent = [rank for rank in after if rank != self.rank and before[rank] == after[rank]]
        slowest = min(map(progress_of, after.values()))
        suspects = silent or [rank for rank in after if progress_of(after[rank]) == slowest]
        names = "; ".join(
            f"rank {rank} on {after[rank].get('host')} (step {after[rank].get('step')}, "
            f"{after[rank].get('phase')})"
            for rank in suspects
        )
        step, phase, _ = self.progress
        state = "no heartbeat from" if silent else "furthest behind:"
        text = (
            f"rank {self.rank} made no progress for {self.limit:.0f} s (step {step}, {phase}); "
            f"{state} {names}"
        )
        self._exit("hang", text, [after[rank] for rank in silent])

    def _exit(self, kind: str, text: str, stopped_peers: list[dict[str, Any]]) -> None:
        """Log an incident, dump stacks, kill this machine's stopped peers, and exit."""
        self.incidents.log(kind, text, rank=self.rank)
        try:
            with (self.heartbeats / f"stacks-{self.rank:05d}.txt").open(
                "w", encoding="utf-8"
            ) as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        for peer in stopped_peers:
            # a stopped process ignores SIGTERM, and launchers wait half a minute before SIGKILL
            if peer.get("machine") == machine() and process_start(peer["pid"]) == peer["start"]:
                os.kill(peer["pid"], signal.SIGKILL)
        exit_now(HUNG)


def progress_of(heartbeat: dict[str, Any]) -> tuple[int, int]:
    """Return a sort key: step, then phase."""
    phase = heartbeat.get("phase")
    return int(heartbeat.get("step", -1)), PHASES.index(phase) if phase in PHASES else -1


exit_now: Callable[[int], Any] = os._exit  # sys.exit in a thread ends only the thread
