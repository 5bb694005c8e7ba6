"""Interleaved timing: compare the speed of decoders on a shared machine.

The speed of a shared machine may change by half from one second to the next. The decoders therefore
generate a block of tokens each in turn. Consecutive blocks run at about the same machine speed, so
the median over rounds of the ratio of their times does not depend on other load.
"""

import statistics
import threading
import time
from collections.abc import Iterator

import torch

from benchmarks.baselines import Decoder

BLOCK_TOKENS = 64


class InterleavedRunner:
    """Runs a decoder in its own thread and pauses it after each block of tokens."""

    def __init__(self, decode: Decoder, num_context: int, rounds: int) -> None:
        """Generate num_context tokens in the first turn, then a block in each of `rounds`."""
        self.decode = decode
        self.num_context = num_context
        self.rounds = rounds
        self.resume = threading.Semaphore(0)
        self.paused = threading.Semaphore(0)
        self.count = 0
        self.seconds = 0.0  # CPU time of the last turn
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def run_turn(self) -> float:
        """Generate up to the next pause; returns the seconds of CPU time."""
        self.resume.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error
        return self.seconds

    def _run(self) -> None:
        torch.set_num_threads(1)  # applies to this thread
        self.resume.acquire()
        self.started_at = time.thread_time()
        try:
            self.decode([12], self.num_context + BLOCK_TOKENS * self.rounds, self._on_token)
        except BaseException as error:  # run_turn raises it
            self.error = error
            self.paused.release()

    def _on_token(self) -> None:
        """Count a token; pause at the end of a turn."""
        self.count += 1
        timed = self.count - self.num_context
        if timed < 0 or timed % BLOCK_TOKENS:
            return
        self.seconds = time.thread_time() - self.started_at
        self.paused.release()
        if timed < BLOCK_TOKENS * self.rounds:
            self.resume.acquire()
        self.started_at = time.thread_time()


def relative_speeds(decoders: dict[str, tuple[Decoder, int]], rounds: int) -> dict[str, float]:
    """Speed of each decoder relative to the first: median over rounds of the ratio of block times.

    `decoders` maps a name to a decoder and the tokens that it generates before it is timed. CPU
    only: times are CPU times of threads.
    """
    runners = {
        name: InterleavedRunner(decode, num_context, rounds)
        for name, (decode, num_context) in decoders.items()
    }
    for runner in runners.values():
        runner.run_turn()  # the untimed tokens
    times = list(_run_rounds(runners, rounds))
    base = next(iter(runners))
    return {name: statistics.median(row[base] / row[name] for row in times) for name in runners}


def _run_rounds(runners: dict[str, InterleavedRunner], rounds: int) -> Iterator[dict[str, float]]:
    """Yield the seconds of a block per decoder; every other round runs in reverse order."""
    for index in range(rounds):
        order = list(runners)[:: 1 if index % 2 else -1]
        yield {name: runners[name].run_turn() for name in order}
