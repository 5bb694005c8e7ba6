"""Interface of a kernel backend; model.kernels.reference specifies every operation."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class CausalConv1d(Protocol):
    """See model.kernels.reference.causal_conv1d."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None = None
    ) -> Tensor: ...


class SelectiveScan(Protocol):
    """See model.kernels.reference.selective_scan."""

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
        doc_starts: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class RmsNorm(Protocol):
    """See model.kernels.reference.rms_norm."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        split_sizes: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor: ...


class LossKernels(Protocol):
    """Cross entropy on a chunk of logits [t, v]; see model.kernels.reference."""

    def loss_statistics(self, logits: Tensor, labels: Tensor) -> Tensor: ...

    def loss_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        log_sums: Tensor,
        grad_loss: Tensor,
        grad_log_sum: Tensor,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """The operations of one backend."""

    name: str
    causal_conv1d: CausalConv1d
    selective_scan: SelectiveScan
    rms_norm: RmsNorm
    loss: LossKernels
