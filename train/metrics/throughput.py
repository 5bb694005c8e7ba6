"""Tokens per second, MFU and data wait of a run: one mean over its last steps, for every sink."""

from collections import deque

from train.metrics.records import Record


class Throughput:
    """Means over the last WINDOW steps of this start.

    The time of a step is `step_seconds`: reading, forward, backward and update. Validation, checks
    and saves between two steps do not count. The first step of a start, which compiles kernels and
    fills caches, leaves the window when the second one arrives.
    """

    WINDOW = 50  # steps: a single slow one must not move the end of the run by weeks

    def __init__(self, ranks: int, flops_per_token: float, peak_flops: float | None) -> None:
        """`peak_flops` is the peak of one rank in FLOP/s; None where it is not known."""
        self.ranks = ranks
        self.mfu_per_rate = None if peak_flops is None else flops_per_token / (ranks * peak_flops)
        self.num_steps = 0
        # tokens, seconds and data wait in seconds of each step
        self.window: deque[tuple[int, float, float]] = deque(maxlen=self.WINDOW)

    def add(self, record: Record) -> None:
        """Take in the step of a record."""
        if self.num_steps == 1:
            self.window.clear()
        self.num_steps += 1
        tokens = record["batch"] * record["seq_len"]
        self.window.append((tokens, record["step_seconds"], record["data_wait_seconds"]))

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together."""
        return sum(tokens for tokens, _, _ in self.window) / self._seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s as a share of the peak of all ranks; None where the peak is not known."""
        return None if self.mfu_per_rate is None else self.tokens_per_second * self.mfu_per_rate

    @property
    def data_wait(self) -> float:
        """Share of the time that the first rank waited for data."""
        return sum(wait for _, _, wait in self.window) / self._seconds

    @property
    def _seconds(self) -> float:
        return max(sum(seconds for _, seconds, _ in self.window), 1e-9)
