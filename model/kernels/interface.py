"""What a backend offers: the model's expensive operations, all with the meaning that the reference gives them."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
