"""Requests to leave: SIGTERM, SIGUSR1, SIGINT, the end of the allotted time, or a launcher that is
gone.

The loop asks once per step, on every rank, and all leave after the same step. A request can be
repeated without harm.
"""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process has been asked to leave, and why."""

    def __init__(self, stop_after_seconds: float | None, margin_seconds: float) -> None:
        """Count the time limit from here; under Slurm also the job's end less the margin."""
        self.why: str | None = None
        limits = [] if stop_after_seconds is None else [stop_after_seconds]
        if end := os.environ.get("SLURM_JOB_END_TIME"):
            limits.append(float(end) - time.time() - margin_seconds)
        # from now on the monotonic clock counts: the other one may jump
        self.end = time.monotonic() + min(limits) if limits else None
        self.parent = os.getppid()

    def install(self) -> None:
        """Take over the signals for good: later ones, even on the way out, change nothing."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def reason(self) -> str | None:
        """Why this process should leave, or None."""
        if self.why is None and self.end is not None and time.monotonic() >= self.end:
            self.why = "the time limit is near"
        if self.why is None and os.getppid() != self.parent:
            self.why = "its launcher is gone"
        return self.why

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.why is None:
            self.why = f"it received {signal.Signals(number).name}"
