"""Whether a step did the model good: losses that are not finite, loss spikes, slow ranks.

Every decision is a function of values that all ranks share, so all ranks decide alike; what a
decision depends on is part of the checkpoint, so a resumed run decides as the uninterrupted one
would have.

The spike rule is OLMo-core's SkipStepOptimizer's (six standard deviations over 128 steps, on the
loss), with the window kept across restarts and never fed a value that is not finite. What follows a
spike that lasts is PaLM's remedy (arXiv 2204.02311, section 5.1): go back to a checkpoint from
before it and leave out the data seen since.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from train.resilience.config import HealthConfig

MIN_SLOWER_SECONDS = 0.005  # per micro-batch; less is noise of the scheduler


class SpikeDetector:
    """Decide from past losses whether to skip a step's update, roll back or abort."""

    # attribute -> name in a checkpoint's state.json, which older runs have
    SAVED_AS = {
        "window": "window",
        "stage": "stage",
        "skipped": "skipped",
        "spikes": "spikes",
        "since": "since",
        "rollbacks": "rewinds",
        "updates_since_rollback": "calm",
    }

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.window: list[float] = []  # losses of the stage's last updates
        self.stage = ""
        self.skipped = 0  # consecutive steps without an update
        self.spikes = 0  # those of them, consecutive, that had a finite loss
        self.since: int | None = None  # token position at which these spikes began
        self.rollbacks = 0  # reset after a whole window of updates without another
        self.updates_since_rollback = 0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            saved: list(value) if isinstance(value := getattr(self, name), list) else value
            for name, saved in self.SAVED_AS.items()
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's state. The oldest checkpoints have none: the window is empty."""
        for name, saved in self.SAVED_AS.items():
            if saved in state:
                setattr(self, name, state[saved])
        self.window = list(self.window)[-self.config.spike_window_updates :]

    def check(self, loss: float, stage: str) -> str | None:
        """Return why the update of a step with this mean loss must be skipped, or None.

        Each stage has a new mixture and so a new loss level: its window starts empty.
        """
        if stage != self.stage:
            self.stage, self.window = stage, []
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self.window) < self.config.spike_window_updates:
            return None
        limit = statistics.fmean(self.window) + self.config.spike_sigmas * statistics.pstdev(
            self.window
        )
        return f"the loss {loss:.4f} is a spike above {limit:.4f}" if loss > limit else None

    def update(self, loss: float, tokens: int, updated: bool, spiked: bool) -> None:
        """Record a step that started at token position `tokens`."""
        if updated:
            self.window = [*self.window, loss][-self.config.spike_window_updates :]
            self.skipped = 0
            self.spikes = 0
            self.since = None
            self.updates_since_rollback += 1
            if self.updates_since_rollback >= self.config.spike_window_updates:
                self.rollbacks = 0
            return
        self.skipped += 1
        if spiked:
            self.since = tokens if self.since is None else self.since
            self.spikes += 1

    def start_after_rollback(self, rollbacks: int) -> None:
        """Forget the spike that this rollback, the `rollbacks`-th in a row, has undone."""
        self.rollbacks = rollbacks
        self.updates_since_rollback = 0
        self.skipped = 0
        self.spikes = 0
        self.since = None

    @property
    def should_abort(self) -> str | None:
        """Why the run must stop, or None."""
        if self.skipped > self.config.max_skipped_updates:
            return f"{self.skipped} updates in a row were skipped"
        if self.should_roll_back and self.rollbacks >= self.config.max_rollbacks:
            return (
                f"the loss spiked again within {self.config.spike_window_updates} updates of "
                f"rollback {self.rollbacks}"
            )
        return None

    @property
    def should_roll_back(self) -> bool:
        """Whether a spike has lasted for spike_patience_updates: skipping does not help."""
        return self.spikes >= self.config.spike_patience_updates


class StragglerDetector:
    """Find ranks whose compute time per micro-batch stays longer than that of the other ranks.

    Across machines, a rank is slow if its median step is slow in two consecutive windows. Ranks of
    one machine share its cores, so any other process slows one of them for a while: there, a rank
    is slow if its fastest step is slow in eight consecutive windows. A rank that stays slow is
    reported again after twice as many windows.
    """

    def __init__(self, window_steps: int, factor: float, *, one_machine: bool) -> None:
        self.factor = factor
        self.statistic: Callable[[Sequence[float]], float] = (
            min if one_machine else statistics.median
        )
        self.num_windows = 8 if one_machine else 2
        self.steps: deque[list[float]] = deque(maxlen=window_steps)
        self.slow_windows: dict[int, int] = {}  # rank -> consecutive slow windows

    def add(self, seconds: list[float]) -> list[tuple[int, float]]:
        """Add every rank's seconds for one step; returns (slow rank, factor) pairs."""
        self.steps.append(seconds)
        if len(self.steps) < (self.steps.maxlen or 0):
            return []
        rank_seconds = [self.statistic(column) for column in zip(*self.steps, strict=True)]
        self.steps.clear()
        factors = {}
        for rank, own_seconds in enumerate(rank_seconds):
            others = rank_seconds[:rank] + rank_seconds[rank + 1 :] or [own_seconds]
            typical = statistics.median(others)
            if own_seconds > self.factor * typical and own_seconds - typical > MIN_SLOWER_SECONDS:
                factors[rank] = own_seconds / max(typical, 1e-9)
        self.slow_windows = {rank: self.slow_windows.get(rank, 0) + 1 for rank in factors}
        return [(rank, factor) for rank, factor in factors.items() if self._is_due(rank)]

    def _is_due(self, rank: int) -> bool:
        """Whether a rank's slow windows are num_windows times a power of two."""
        multiple, remainder = divmod(self.slow_windows[rank], self.num_windows)
        return remainder == 0 and multiple.bit_count() == 1
