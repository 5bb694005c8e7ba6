"""Head and loss in one, so that all logits never exist: a chunk of tokens at a time, and again in
the backward.

The backward starts with the last chunk, whose logits are kept: they are the peak of memory in any
case.

The vocabulary may be cut over tensor-parallel ranks: each takes statistics of its own rows of the
head, and one maximum and one sum over ranks, of all tokens at once, join them.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from model.config import loss_chunk
from model.kernels.interface import LossRows
from model.kernels.reference import computing_type, product_type


class VocabularyGroup(Protocol):
    """The ranks that a vocabulary is cut over."""

    def offset(self, rows: int) -> int:
        """Id of the first of this rank's `rows` tokens."""

    def maximum(self, x: Tensor) -> Tensor:
        """Elementwise over ranks."""

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise over ranks."""


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy, log-sum-exp of hidden @ weight.T; backward recomputes earlier chunks."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: LossRows,
        group: VocabularyGroup | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """hidden [t, e], weight [v, e], labels [t] -> loss, log-sum [t], fp32 (fp64 for fp64)."""
        dtype = product_type(hidden)
        statistics = hidden.new_empty(3, len(labels), dtype=computing_type(hidden))
        local = labels if group is None else labels - group.offset(len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            head, logits = weight.to(dtype), None
            for part in _chunks(len(labels), chunk):
                logits = None  # one chunk's at a time
                logits = hidden[part].to(dtype) @ head.t()
                statistics[:, part] = rows.loss_statistics(logits, local[part])
        own, top, sums = statistics
        if group is not None:
            here, top = top, group.maximum(top)
            own, sums = group.sum(torch.stack([own, sums * (here - top).exp()]))
        log_sums = top + sums.log()
        ctx.save_for_backward(hidden, weight, local, log_sums)
        ctx.run = dtype, rows, group, chunk  # type: ignore[attr-defined]
        ctx.logits = logits  # type: ignore[attr-defined]
        return log_sums - own, log_sums

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor, grad_log_sum: Tensor) -> tuple[Any, ...]:
        """Products in the forward's type; the weight's gradient is summed over chunks in fp32."""
        hidden, weight, labels, log_sums = ctx.saved_tensors  # type: ignore[attr-defined]
        dtype, rows, group, chunk = ctx.run  # type: ignore[attr-defined]
        grad_hidden, grad_weight = (
            torch.empty_like(hidden),
            torch.zeros_like(weight, dtype=log_sums.dtype),
        )
        head = weight.to(dtype)
        kept, ctx.logits = ctx.logits, None  # type: ignore[attr-defined]  # they become their gradient: only once
        for part in reversed(_chunks(len(labels), chunk)):
            states = hidden[part].to(dtype)
            logits, kept = states @ head.t() if kept is None else kept, None
            grad = rows.loss_gradient(
                logits, labels[part], log_sums[part], grad_loss[part], grad_log_sum[part]
            )
            grad_hidden[part] = (grad @ head).to(hidden.dtype)
            grad_weight += grad.t() @ states
            del logits, grad  # before the next chunk's
        if group is not None:
            grad_hidden = group.sum(grad_hidden)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: LossRows,
    group: VocabularyGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy per token in nats and log of the softmax's sum: hidden [t, e], weight [v, e],
    labels [t] -> [t].

    Peak memory is one chunk's logits (model.config.loss_chunk); the cost is one more forward of the
    head for all chunks but one. With a group, v is this rank's part of the vocabulary: 3 values per
    token cross ranks forward, and one sum of hidden's gradient backward. Labels are ids of the
    vocabulary; they are not checked, since that would wait for the device.
    """
    chunk = loss_chunk(*hidden.shape)
    result: tuple[Tensor, Tensor] = LinearCrossEntropy.apply(
        hidden, weight, labels.long(), rows, group, chunk
    )
    return result
