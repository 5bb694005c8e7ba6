"""One interface to the model's expensive operations, several implementations, chosen once per run and said aloud."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from model.config import Backend
from model.kernels import reference


class CausalConv1d(Protocol):
    """See model.kernels.reference.causal_conv1d, the specification."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor: ...


class SelectiveScan(Protocol):
    """See model.kernels.reference.selective_scan, the specification."""

    def __call__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        starts: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Kernels:
    """The operations of one backend."""

    name: str
    causal_conv1d: CausalConv1d
    selective_scan: SelectiveScan


REFERENCE = Kernels("reference", reference.causal_conv1d, reference.selective_scan)


def load(backend: Backend) -> Kernels:
    """The kernels of a backend; today the reference serves every choice, so `auto` resolves to it."""
    return REFERENCE
