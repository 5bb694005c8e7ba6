"""Tokens per second, MFU and data wait of a run, averaged over the last steps for all sinks."""

from collections import deque

from train.metrics.records import Record


class Throughput:
    """Means over the last WINDOW steps since this start.

    The time of a step is `step_seconds`: reading, forward, backward and update, without
    validation, checks and saves. The first step of a start compiles kernels and fills caches; the
    second step removes it from the window.
    """

    WINDOW = 50  # steps; one slow step must not move the shown end of the run by weeks

    def __init__(self, ranks: int, flops_per_token: float, peak_flops: float | None) -> None:
        """`peak_flops` is the peak FLOP/s of one rank, None if not known."""
        self.ranks = ranks
        self.mfu_per_rate = None if peak_flops is None else flops_per_token / (ranks * peak_flops)
        self.num_steps = 0
        # tokens, seconds and data wait in seconds of each step
        self.window: deque[tuple[int, float, float]] = deque(maxlen=self.WINDOW)

    def add(self, record: Record) -> None:
        """Add the step of a record."""
        if self.num_steps == 1:
            self.window.clear()
        self.num_steps += 1
        tokens = record["batch"] * record["seq_len"]
        self.window.append((tokens, record["step_seconds"], record["data_wait_seconds"]))

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks."""
        return sum(tokens for tokens, _, _ in self.window) / self._seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s as a share of the peak of all ranks; None if the peak is not known."""
        return None if self.mfu_per_rate is None else self.tokens_per_second * self.mfu_per_rate

    @property
    def data_wait(self) -> float:
        """Share of time in which the first rank waited for data."""
        return sum(wait for _, _, wait in self.window) / self._seconds

    @property
    def _seconds(self) -> float:
        return max(sum(seconds for _, seconds, _ in self.window), 1e-9)
