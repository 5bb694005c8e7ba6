"""Requests to stop: Ctrl-C (SIGINT), SIGTERM, SIGUSR1, a time limit, or a launcher that has ended.

The loop checks for one after each step on every rank; all ranks stop after the same step and save.
A repeated request has no effect.
"""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Records whether and why this process must stop."""

    def __init__(self, stop_after_seconds: float | None, margin_seconds: float) -> None:
        """Count the time limit from here; under Slurm also the job's end less the margin."""
        self.why: str | None = None
        limits: dict[str, float] = {}  # seconds from here
        if stop_after_seconds is not None:
            limits["stopped by health.stop_after_seconds"] = stop_after_seconds
        if end := os.environ.get("SLURM_JOB_END_TIME"):
            limits["stopped by Slurm's time limit"] = float(end) - time.time() - margin_seconds
        # from here on the monotonic clock counts: the wall clock may jump
        self.end = time.monotonic() + min(limits.values()) if limits else None
        self.limit = min(limits, key=limits.__getitem__, default="")
        self.parent = os.getppid()

    def install(self) -> None:
        """Handle the signals from here to the end of the process: later ones have no effect."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def reason(self) -> str | None:
        """Return why the run must stop, such as "stopped by Ctrl-C", or None."""
        if self.why is None and self.end is not None and time.monotonic() >= self.end:
            self.why = self.limit
        if self.why is None and os.getppid() != self.parent:
            self.why = "stopped because its launcher ended"
        return self.why

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.why is None:
            self.why = f"stopped by {signal_name(number)}"


def signal_name(number: int) -> str:
    """Return a signal's name for messages."""
    if number == signal.SIGINT:
        return "Ctrl-C"
    name = signal.Signals(number).name
    return f"{name} (Slurm's notice)" if "SLURM_JOB_ID" in os.environ else name
