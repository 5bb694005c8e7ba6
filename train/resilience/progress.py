"""Long work of some ranks while the others wait: every rank learns whether it goes on."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

EXCHANGE_SECONDS = 1.0
Result = TypeVar("Result")


class Progress:
    """Counts this rank's work, in bytes or other units, and reports that of all ranks."""

    def __init__(self, group: Any = None) -> None:
        """`group` exchanges tensors on the CPU."""
        self.amount = 0
        self.group = group

    def add(self, amount: int = 1) -> None:
        """Count work that is done."""
        self.amount += amount

    def run(self, action: Callable[[], Result], on_progress: Callable[[], object]) -> Result:
        """Run an action on every rank in a thread, until it has ended on all; a collective.

        Returns this rank's result, or raises its exception. Ranks exchange once a second whether
        their count has grown, and `on_progress` is called where that of any rank has. So a rank
        that waits for a slow one is not taken for one that hangs; no file or launcher takes part.
        """
        future: Future[Result] = Future()

        def work() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        # a daemon, so that a process can exit while the action hangs
        threading.Thread(target=work, name="action", daemon=True).start()
        seen = self.amount
        while True:
            with suppress(TimeoutError):
                future.exception(EXCHANGE_SECONDS)
            amount = self.amount
            # [some rank still runs, some rank's count has grown]
            flags = torch.tensor([not future.done(), amount != seen], dtype=torch.int32)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
            seen = amount
            is_running, has_grown = flags.tolist()
            if has_grown:
                on_progress()
            if not is_running:
                return future.result()
