"""Phases of a step. The loop announces each one; the watchdog and the profiler listen."""

from collections.abc import Callable

PHASES = (  # in the order of a step
    "start",
    "read",
    "forward",
    "backward",
    "reduce_stats",
    "update",
    "validate",
    "log",
    "check",
    "save",
    "exit",
)
# Patience of phases with steps that no beat divides: one sync or removal of a save, building the
# model, validation.
LONG_PATIENCE = 6.0
Listener = Callable[[int, str, float], None]


class Phases:
    """Tells each listener the finished steps, the phase that begins, and its patience.

    A phase may take its patience times health.hang_seconds without a beat of the watchdog.
    """

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    def enter(self, step: int, phase: str, patience: float = 1.0) -> None:
        """Announce that a phase begins."""
        for listener in self.listeners:
            listener(step, phase, patience)
