"""Several decoders in turns, a block of tokens each: their speeds compare whatever else the machine
does meanwhile.

A machine that others share changes its speed by half from one second to the next. Blocks that lie
side by side in time see the same machine, so that the ratio of their times, and the median of that
over many rounds, is the decoders' own.
"""

import statistics
import threading
import time
from collections.abc import Iterator

import torch

from benchmarks.baselines import Decoder

BLOCK = 64  # tokens that are timed together


class InterleavedRunner:
    """A decoder that waits after each block for its next turn; it works in a thread of its own."""

    def __init__(self, decode: Decoder, first: int, rounds: int) -> None:
        """Generate `first` tokens before the first turn, then a block in each of `rounds`."""
        self.decode, self.first, self.rounds = decode, first, rounds
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.count = 0
        self.seconds = 0.0  # of the processor, in the last turn
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def turn(self) -> float:
        """Let it generate up to its next stop; returns the seconds of processor time that it
        took.
        """
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return self.seconds

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread
        self.go.acquire()
        self.begun = time.thread_time()
        try:
            self.decode([12], self.first + BLOCK * self.rounds, self._watch)
        except BaseException as error:  # raised in the turn that asked for it
            self.error = error
            self.done.release()

    def _watch(self) -> None:
        """After each token: end the turn when its tokens are there."""
        self.count += 1
        if self.count < self.first or (self.count - self.first) % BLOCK:
            return
        self.seconds = time.thread_time() - self.begun
        self.done.release()
        if self.count < self.first + BLOCK * self.rounds:
            self.go.acquire()
        self.begun = time.thread_time()


def relative_speeds(decoders: dict[str, tuple[Decoder, int]], rounds: int) -> dict[str, float]:
    """Speed of each decoder relative to the first one's: the median over rounds of the ratio of
    neighbouring blocks.

    Each comes with the tokens that it generates before it is timed. On a CPU only: time is each
    thread's own.
    """
    runners = {
        name: InterleavedRunner(decode, first, rounds) for name, (decode, first) in decoders.items()
    }
    for each in runners.values():
        each.turn()  # the tokens before
    times = list(_rounds(runners, rounds))
    base = next(iter(runners))
    return {name: statistics.median(row[base] / row[name] for row in times) for name in runners}


def _rounds(runners: dict[str, InterleavedRunner], rounds: int) -> Iterator[dict[str, float]]:
    """Times of a block of each, round by round; every other round goes backwards, so that no order
    is an advantage.
    """
    for number in range(rounds):
        order = list(runners)[:: 1 if number % 2 else -1]
        yield {name: runners[name].turn() for name in order}
