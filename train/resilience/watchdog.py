"""Watchdog of a rank: ends the rank when it hangs, and writes its heartbeats.

A stopped rank (kill -STOP, a dead GPU, unresponsive storage) leaves its peers inside a collective.
Two threads per rank: one counts the seconds since the loop's last sign of progress, in memory, and
ends the rank with a code that requests a restart. The other writes the rank's step, phase and a
counter to a small file, renews the run's lock, and reads its peers' files while the loop is slow.
Storage that hangs blocks only the second one.
Cost: a file of 512 bytes per rank, overwritten every few seconds.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.records import parse_typed
from core.run import RunFiles
from train.phases import LONG_PATIENCE, PHASES
from train.resilience.incidents import HUNG, Incidents
from train.resilience.last_words import leave_last_words
from train.resilience.run_lock import LOCK_TIMEOUT_SECONDS, RENEW_SECONDS, RunLock, machine
from train.resilience.run_lock import process_start as start_of

HEARTBEAT_BYTES = 512
TICK_SECONDS = 0.5
SILENT_READS = 3  # a peer whose heartbeat has not changed for so many reads is silent
OBSERVE_SECONDS = 1.0  # that the end of a rank may wait for these reads


@dataclass(frozen=True)
class Heartbeat:
    """What a rank writes about itself; the defaults stand for a rank without a heartbeat."""

    step: int = -1
    phase: str = ""
    written_ns: int = 0  # by its monotonic clock
    host: str = "an unknown host"
    machine: str = ""
    pid: int = 0
    start: str | None = None  # of the process, in kernel ticks

    @property
    def progress(self) -> tuple[int, int]:
        """A sort key: step, then phase."""
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else -1


class Watchdog:
    """The watchdog of one rank."""

    def __init__(self, folder: Path, rank: int, world_size: int, hang_seconds: float) -> None:
        self.folder = folder
        self.heartbeats = RunFiles(folder).heartbeats
        self.rank = rank
        self.world_size = world_size
        self.limit = hang_seconds
        self.tick = min(TICK_SECONDS, hang_seconds / 8)
        self.period = min(RENEW_SECONDS, hang_seconds / 8)  # of heartbeats
        self.run_lock: RunLock | None = None
        self.lost_lock = False
        self.incidents = Incidents(folder)
        self.stopped = threading.Event()
        self.own = Heartbeat(
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            start=start_of(os.getpid()),
        )
        self.descriptor = -1
        self.num_beats = 0  # signs of progress of the loop
        self.num_answers = 0  # of the storage, to the second thread
        self.idle_seconds = 0.0  # since the last sign of progress
        self.unanswered_seconds = 0.0  # since the last answer
        self.num_reads = 0  # of the peers' heartbeats, since the loop is slow
        self.peers: dict[int, tuple[Heartbeat, int]] = {}  # and how many reads it is unchanged
        # the job that held the lock before may be watched for so long
        self.enter_phase(0, "start", LONG_PATIENCE + LOCK_TIMEOUT_SECONDS / hang_seconds)

    def enter_phase(self, step: int, phase: str, patience: float = 1.0) -> None:
        """Record progress; the phase may take `patience` times the limit without a beat."""
        self.progress = (step, phase, patience)
        self.beat()

    def beat(self) -> None:
        """Record progress within the phase."""
        self.num_beats += 1

    def watch(self) -> None:
        """Start both threads; they write nothing to the run's folder before `start`."""
        for target in (self._watch, self._visit_storage):
            threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True).start()

    def start(self, run_lock: RunLock | None) -> None:
        """Start writing heartbeats; `run_lock` is renewed if given (first rank)."""
        self.heartbeats.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self._path(self.rank), os.O_CREAT | os.O_WRONLY, 0o644)
        self._write_heartbeat()
        self.run_lock = run_lock

    def stop(self) -> None:
        """Remove the heartbeat file and stop the threads."""
        if self.descriptor >= 0:
            with suppress(OSError):
                self._path(self.rank).unlink()
        self.stopped.set()

    def host(self, rank: int) -> str:
        """Return the host of a rank, for messages."""
        return self._read(rank).host

    def _path(self, rank: int) -> Path:
        return self.heartbeats / f"rank-{rank:05d}.json"

    def _read(self, rank: int) -> Heartbeat:
        path = self._path(rank)
        try:
            return parse_typed(path.read_bytes(), Heartbeat, str(path))
        except (OSError, InputError):
            return Heartbeat()

    def _visit_storage(self) -> None:
        """Everything that the watchdog does in the run's folder; it may block for ever."""
        while not self.stopped.wait(self.period):
            self._write_heartbeat()
            lock = self.run_lock
            # a lock that has been released meanwhile is not lost
            if lock is not None and not lock.renew() and self.run_lock is lock:
                self.lost_lock = True
            self.num_answers += 1
            if self.idle_seconds < self.limit / 2:
                self.peers = {}
                self.num_reads = 0
            else:
                self._read_peers()

    def _write_heartbeat(self) -> None:
        """Overwrite this rank's file in place, which needs no free disk space."""
        step, phase, _ = self.progress
        line = json.dumps(
            {**asdict(self.own), "step": step, "phase": phase, "written_ns": time.monotonic_ns()}
        )
        # on an error peers report this rank as silent; nothing else depends on the file
        with suppress(OSError):
            if self.descriptor < 0:
                self.folder.stat()
            else:
                os.pwrite(self.descriptor, line.ljust(HEARTBEAT_BYTES).encode(), 0)

    def _read_peers(self) -> None:
        peers = {}
        for rank in range(self.world_size):
            heartbeat = self._read(rank)
            before, unchanged = self.peers.get(rank, (None, 0))
            peers[rank] = (heartbeat, unchanged + 1 if heartbeat == before else 0)
        self.peers = peers
        self.num_reads += 1

    def _watch(self) -> None:
        """Decide from memory and a clock; no file of the run is touched before the decision."""
        last = time.monotonic()
        beats, answers = self.num_beats, self.num_answers
        while not self.stopped.wait(self.tick):
            now = time.monotonic()
            # A process that was stopped, or a machine that was suspended, could not progress:
            # the time counts in which this thread runs.
            seconds = min(now - last, 2 * self.tick)
            last = now
            self.idle_seconds = self.idle_seconds + seconds if self.num_beats == beats else 0.0
            self.unanswered_seconds = (
                self.unanswered_seconds + seconds if self.num_answers == answers else 0.0
            )
            beats, answers = self.num_beats, self.num_answers
            if self.lost_lock:
                self._end("lost run lock", "another job took over this run's folder", [])
            elif self._hangs():
                self._report_hang()

    def _hangs(self) -> bool:
        """Whether the loop made no progress for too long. Only storage that answers gets time."""
        is_answered = self.unanswered_seconds < self.limit
        allowed = self.limit * (self.progress[2] if is_answered else 1.0)
        if is_answered and self.num_reads <= SILENT_READS:
            allowed += OBSERVE_SECONDS
        return self.idle_seconds > allowed

    def _report_hang(self) -> None:
        step, phase, _ = self.progress
        text = (
            f"rank {self.rank} made no progress for {self.idle_seconds:.0f} s (step {step}, "
            f"{phase}); "
        )
        peers = self.peers
        silent = [
            heartbeat
            for rank, (heartbeat, unchanged) in peers.items()
            if unchanged >= SILENT_READS and rank != self.rank
        ]
        if self.unanswered_seconds > self.limit / 2:
            text += f"{self.folder} has not answered for {self.unanswered_seconds:.0f} s"
            silent = []
        elif silent:
            text += f"no heartbeat from {self._names(lambda rank: peers[rank][0] in silent)}"
        elif peers:
            slowest = min(peer.progress for peer, _ in peers.values())
            text += (
                f"furthest behind: {self._names(lambda rank: peers[rank][0].progress == slowest)}"
            )
        else:
            text += "no heartbeats were read"
        self._end("hang", text, silent)

    def _names(self, is_named: Callable[[int], bool]) -> str:
        return "; ".join(
            f"rank {rank} on {peer.host} (step {peer.step}, {peer.phase})"
            for rank, (peer, _) in self.peers.items()
            if is_named(rank)
        )

    def _end(self, kind: str, text: str, stopped_peers: list[Heartbeat]) -> None:
        """Leave the reason and the stacks, kill this machine's stopped peers, and exit."""
        try:
            leave_last_words(self.incidents, self.heartbeats, self.rank, kind, text)
            for peer in stopped_peers:
                # a stopped process ignores SIGTERM, and launchers wait half a minute before SIGKILL
                if peer.machine == self.own.machine and start_of(peer.pid) == peer.start:
                    with suppress(ProcessLookupError):
                        os.kill(peer.pid, signal.SIGKILL)
        finally:  # also where no thread can be started
            exit_now(HUNG)


exit_now: Callable[[int], Any] = os._exit  # sys.exit in a thread ends only the thread
