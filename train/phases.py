"""The phases of a step. The loop announces each; the watchdog and the profiler listen."""

from collections.abc import Callable

PHASES = (  # in the order of a step
    "start",
    "read",
    "forward",
    "backward",
    "agree",
    "update",
    "validate",
    "log",
    "check",
    "save",
    "leave",
)
# times health.hang_seconds, for what takes long: reading a checkpoint, validation, the last save
LONG_PATIENCE = 6.0
Listener = Callable[[int, str, float], None]


class Phases:
    """The hook of one loop: listeners get the steps behind it, the phase that begins, and how many
    times health.hang_seconds it may take.
    """

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    def enter(self, step: int, phase: str, patience: float = 1.0) -> None:
        """A phase begins."""
        for listener in self.listeners:
            listener(step, phase, patience)
