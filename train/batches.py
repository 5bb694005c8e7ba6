"""This rank's micro-batches, read while the step before them computes."""

from concurrent.futures import Future, ThreadPoolExecutor

from data.stream.loader import Batch, Loader
from train.distributed import Ranks
from train.schedule import Schedule

MicroBatches = list[tuple[Batch, bool]]  # each with is_padding


class Batches:
    """The micro-batches of one rank, one step ahead of the loop."""

    def __init__(
        self, loader: Loader, schedule: Schedule, ranks: Ranks, micro_batch_tokens: int, equal: bool
    ) -> None:
        """`equal` gives every rank as many micro-batches as the one with the most."""
        self.loader, self.schedule, self.ranks = loader, schedule, ranks
        self.micro_batch_tokens, self.equal = micro_batch_tokens, equal
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.ahead: dict[int, Future[MicroBatches]] = {}

    def read(self, token: int) -> MicroBatches:
        """Those of the step that begins at `token`; begins to read the next step's."""
        pending = self.ahead.pop(token, None) or self._submit(token)
        following = token + self.schedule.at(token).tokens
        self.ahead = (
            {} if following >= self.schedule.total else {following: self._submit(following)}
        )
        return pending.result()

    def close(self) -> None:
        """Drop what is being read."""
        self.reader.shutdown(wait=False, cancel_futures=True)

    def _submit(self, token: int) -> "Future[MicroBatches]":
        step = self.schedule.at(token)
        batches = self.loader.micro_batches(
            token,
            step.batch,
            self.ranks.dp_rank,
            self.ranks.dp_size,
            self.micro_batch_tokens // step.seq_len,
            self.equal,
        )
        return self.reader.submit(lambda: list(batches))
