"""What the GPU benchmark has measured, and what it could not and why: one failure costs no other
row.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Measurement, median_seconds
from model.kernels import BACKENDS, REFERENCE
from model.kernels.interface import Kernels
from train.config import RunConfig

L2_BYTES = 128 * 2**20  # of inputs that rotate: more than an H100's or H200's 50 MiB
COPIES = 64  # of an input at most


class Bench:
    """One device, its backends, and the rows measured so far."""

    def __init__(
        self,
        device: torch.device,
        run: RunConfig,
        length: int,
        batches: list[int],
        budget: float,
        least: int,
    ) -> None:
        self.device, self.run, self.config = device, run, run.model
        self.length, self.batches = length, batches
        self.budget, self.least = budget, least  # seconds and runs of a measurement
        self.dtype = torch.bfloat16
        self.rows: list[Measurement] = []
        self.missing: dict[str, str] = {}
        self.memory: list[dict[str, Any]] = []  # of a rank's step, beside the plan's
        self.backends: dict[str, Kernels] = {}
        for name, module, kernels in BACKENDS[device.type]:
            if (why := module.unavailable_reason()) is None:
                self.backends[name.value] = kernels
            else:
                self.missing[name.value] = why
        self.backends["reference"] = REFERENCE

    @contextmanager
    def attempt(self, who: str, what: str) -> Iterator[None]:
        """Whatever fails within is kept as the reason why this is missing, and the rest goes on."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.missing[f"{who}: {what}"] = f"{type(error).__name__}: {lines[0][:300]}"
            print(f"failed: {who}: {what} ({self.missing[f'{who}: {what}']})", flush=True)
        self.free()

    def free(self) -> None:
        """Give back memory that nothing holds."""
        gc.collect()
        if self.device.type == "cuda":
            # after a fault of a kernel nothing works on the GPU, but rows are kept
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def time(self, what: str, shape: str, who: str, call: Callable[[], Any]) -> float:
        """Measure and keep a row."""
        seconds, runs = median_seconds(call, self.device, self.budget, self.least)
        self.rows.append(Measurement(what, shape, who, seconds, runs))
        return seconds

    def rotation(self, make: Callable[[int], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Inputs that change from call to call, so that none is found in the cache."""
        first = make(0)
        copies = min(COPIES, 1 + L2_BYTES // max(1, sum(x.nbytes for x in first)))
        held = [first] + [make(seed) for seed in range(1, copies)]
        turn = iter(range(10**9))
        return lambda: held[next(turn) % copies]


def agree(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Raise AssertionError where a result is further from what is expected than `tolerance` times
    its norm.
    """
    for index, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        exact = theirs.detach().double()
        error = float((ours.detach().double() - exact).norm() / exact.norm())
        assert error <= tolerance, (
            f"wrong: result {index} is off by {error:.1e}, more than {tolerance:.0e}"
        )
