"""Interface of a backend: the expensive operations, with the semantics of the reference."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class CausalConv1d(Protocol):
    """See model.kernels.reference.causal_conv1d, the specification."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None = None
    ) -> Tensor: ...


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
        doc_starts: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class RmsNorm(Protocol):
    """See model.kernels.reference.rms_norm, the specification."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        parts: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor: ...


class LossRows(Protocol):
    """Loss operations on a chunk of logits [t, v]; specified by model.kernels.reference."""

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
    loss_rows: LossRows
