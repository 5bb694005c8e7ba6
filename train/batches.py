"""A rank's micro-batches, read one step ahead."""

from concurrent.futures import Future, ThreadPoolExecutor

from data.stream.loader import Batch, Loader
from train.distributed import Ranks
from train.schedule import Schedule

MicroBatches = list[tuple[Batch, bool]]  # each with is_padding


class Batches:
    """Reads the micro-batches of the next step in a thread while a step runs."""

    def __init__(
        self,
        loader: Loader,
        schedule: Schedule,
        ranks: Ranks,
        micro_batch_tokens: int,
        equal_micro_batches: bool,
    ) -> None:
        """`equal_micro_batches` pads every rank to as many micro-batches as the fullest has."""
        self.loader = loader
        self.schedule = schedule
        self.ranks = ranks
        self.micro_batch_tokens = micro_batch_tokens
        self.equal_micro_batches = equal_micro_batches
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.prefetched: dict[int, Future[MicroBatches]] = {}

    def read(self, token: int) -> MicroBatches:
        """Return the micro-batches of the step that starts at `token`; prefetch the next step's."""
        pending = self.prefetched.pop(token, None) or self._submit(token)
        next_token = token + self.schedule.at(token).tokens
        self.prefetched = {}
        if next_token < self.schedule.total:
            self.prefetched[next_token] = self._submit(next_token)
        return pending.result()

    def close(self) -> None:
        """Cancel the prefetch."""
        self.executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, token: int) -> "Future[MicroBatches]":
        step = self.schedule.at(token)
        batches = self.loader.micro_batches(
            token,
            step.batch,
            self.ranks.dp_rank,
            self.ranks.dp_size,
            self.micro_batch_tokens // step.seq_len,
            self.equal_micro_batches,
        )
        return self.executor.submit(lambda: list(batches))
