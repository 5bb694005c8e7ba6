"""Requests to stop: a signal, a time limit, or a launcher that has ended.

The loop checks for one after each step on every rank; all ranks stop after the same step and save.
A repeated request has no effect.
"""

import logging
import math
import os
import signal
import time
from types import FrameType

from core.launcher import handle_signals

logger = logging.getLogger(__name__)


class StopRequest:
    """Records whether and why this process must stop."""

    def __init__(
        self,
        stop_after_seconds: float | None,
        margin_seconds: float,
        launcher: int | None = None,
    ) -> None:
        """Count the time limit from here; under Slurm also the job's end less the margin.

        `launcher` is the process that the rank does not outlive, as the rank's start found it.
        """
        self.why: str | None = None
        limits: dict[str, float] = {}  # seconds from here
        if stop_after_seconds is not None:
            limits["stopped by health.stop_after_seconds"] = stop_after_seconds
        seconds = seconds_to_slurm_end()
        if seconds is not None:
            limits["stopped by Slurm's time limit"] = seconds - margin_seconds
        # from here on the monotonic clock counts: the wall clock may jump
        self.end = time.monotonic() + min(limits.values()) if limits else None
        self.limit = min(limits, key=limits.__getitem__, default="")
        self.launcher = launcher

    def install(self) -> None:
        """Handle the signals from here to the end of the process: later ones have no effect."""
        handle_signals(self._handle)

    def reason(self) -> str | None:
        """Return why the run must stop, such as "stopped by Ctrl-C", or None."""
        if self.why is None and self.end is not None and time.monotonic() >= self.end:
            self.why = self.limit
        if self.why is None and self.launcher not in (None, os.getppid()):
            self.why = "stopped because its launcher ended"
        return self.why

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.why is None:
            self.why = f"stopped by {signal_name(number)}"


def seconds_to_slurm_end() -> float | None:
    """Seconds to the end of the Slurm job; None without one, or with a warning if it is no time."""
    text = os.environ.get("SLURM_JOB_END_TIME")
    if text is None:
        return None
    try:
        seconds = float(text) - time.time()
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        logger.warning(
            f"SLURM_JOB_END_TIME is {text!r}, no time to come: the run does not stop before "
            "the job's end by itself, only after a signal"
        )
        return None
    return seconds


def signal_name(number: int) -> str:
    """Return a signal's name for messages."""
    if number == signal.SIGINT:
        return "Ctrl-C"
    name = signal.Signals(number).name
    return f"{name} (Slurm's notice)" if "SLURM_JOB_ID" in os.environ else name
