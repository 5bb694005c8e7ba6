"""Results of the GPU benchmark; a measurement that fails is listed with its error."""

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Measurement, median_seconds
from model.kernels import BACKENDS, REFERENCE
from model.kernels.interface import Kernels
from train.config import RunConfig

ROTATION_BYTES = 128 * 2**20  # of rotating inputs: exceeds the 50 MiB L2 cache of H100 and H200
MAX_COPIES = 64  # of an input


class Bench:
    """A device, its kernel backends, and the results so far."""

    def __init__(
        self,
        device: torch.device,
        run: RunConfig,
        length: int,
        batch_sizes: list[int],
        budget: float,
        min_runs: int,
    ) -> None:
        self.device = device
        self.run = run
        self.config = run.model
        self.length = length
        self.batch_sizes = batch_sizes
        self.budget = budget  # seconds per measurement
        self.min_runs = min_runs  # per measurement
        self.dtype = torch.bfloat16
        self.rows: list[Measurement] = []
        self.missing: dict[str, str] = {}  # what was not measured -> reason
        self.memory: list[dict[str, Any]] = []  # peak of a rank's step and the estimate
        self.backends: dict[str, Kernels] = {}
        for name, module, kernels in BACKENDS[device.type]:
            if (reason := module.unavailable_reason()) is None:
                self.backends[name.value] = kernels
            else:
                self.missing[name.value] = reason
        self.backends["reference"] = REFERENCE

    @contextmanager
    def attempt(self, who: str, what: str) -> Iterator[None]:
        """Record an exception as the reason why `what` of `who` is missing, and continue."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0][:300]}"
            self.missing[f"{who}: {what}"] = reason
            print(f"failed: {who}: {what} ({reason})", flush=True)
        self.free()

    def free(self) -> None:
        """Free unused memory."""
        gc.collect()
        if self.device.type == "cuda":
            # after an illegal memory access every CUDA call fails; keep the results
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def time(self, what: str, shape: str, who: str, call: Callable[[], Any]) -> float:
        """Measure a call, append the result and return its seconds."""
        seconds, runs = median_seconds(call, self.device, self.budget, self.min_runs)
        self.rows.append(Measurement(what, shape, who, seconds, runs))
        return seconds

    def rotation(self, make: Callable[[int], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Return a function that cycles through copies of the inputs, so that none is in cache."""
        first = make(0)
        num_copies = min(MAX_COPIES, 1 + ROTATION_BYTES // max(1, sum(x.nbytes for x in first)))
        copies = [first] + [make(seed) for seed in range(1, num_copies)]
        cycle = itertools.cycle(copies)
        return lambda: next(cycle)


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Raise AssertionError if the relative error of a result, in norm, exceeds `tolerance`."""
    for index, (result, reference) in enumerate(zip(results, expected, strict=True)):
        exact = reference.detach().double()
        error = float((result.detach().double() - exact).norm() / exact.norm())
        assert error <= tolerance, (
            f"wrong: result {index} is off by {error:.1e}, more than {tolerance:.0e}"
        )
