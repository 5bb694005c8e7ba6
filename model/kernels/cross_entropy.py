"""LM head and cross entropy in one function, so that the logits of all tokens never exist at once.

The forward computes logits one chunk of tokens at a time; the backward recomputes them. The forward
saves the logits of the last chunk, where the backward starts: memory holds one chunk's logits in
any case.

The vocabulary may be sharded over tensor-parallel ranks. Each rank computes statistics of its own
vocabulary shard; one all-reduce of maxima and one of sums, over all tokens at once, combine them.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from model.config import loss_chunk
from model.kernels.interface import LossKernels
from model.kernels.reference import compute_dtype, matmul_dtype


class VocabParallelGroup(Protocol):
    """The ranks that a vocabulary is sharded over."""

    def vocab_start_index(self, local_size: int) -> int:
        """Token id of the first row of this rank's shard of `local_size` rows."""

    def all_reduce_max(self, x: Tensor) -> Tensor: ...

    def all_reduce_sum(self, x: Tensor) -> Tensor: ...


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy and log-sum-exp of hidden @ weight.T; the backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        kernels: LossKernels,
        group: VocabParallelGroup | None,
        chunk_length: int,
    ) -> tuple[Tensor, Tensor]:
        """hidden [t, e], weight [v, e], labels [t] -> loss, log-sum [t] in compute_dtype."""
        dtype = matmul_dtype(hidden)
        statistics = hidden.new_empty(3, len(labels), dtype=compute_dtype(hidden))
        if group is not None:
            labels = labels - group.vocab_start_index(len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            head, logits = weight.to(dtype), None
            for chunk in _chunks(len(labels), chunk_length):
                logits = None  # free the previous chunk's logits first
                logits = hidden[chunk].to(dtype) @ head.t()
                statistics[:, chunk] = kernels.loss_statistics(logits, labels[chunk])
        label_logits, max_logits, sum_exp = statistics
        if group is not None:
            local_max = max_logits
            max_logits = group.all_reduce_max(local_max)
            sum_exp = sum_exp * (local_max - max_logits).exp()
            label_logits, sum_exp = group.all_reduce_sum(torch.stack([label_logits, sum_exp]))
        log_sums = max_logits + sum_exp.log()
        ctx.save_for_backward(hidden, weight, labels, log_sums)
        ctx.dtype = dtype
        ctx.kernels = kernels
        ctx.group = group
        ctx.chunk_length = chunk_length
        ctx.last_logits = logits
        return log_sums - label_logits, log_sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_log_sum: Tensor) -> tuple[Any, ...]:
        """Products in the forward's type; the weight's gradient is summed over chunks in fp32."""
        hidden, weight, labels, log_sums = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_sums.dtype)
        head = weight.to(ctx.dtype)
        # loss_gradient may overwrite the saved logits: a second backward must recompute them
        logits, ctx.last_logits = ctx.last_logits, None
        for chunk in reversed(_chunks(len(labels), ctx.chunk_length)):
            hidden_chunk = hidden[chunk].to(ctx.dtype)
            if logits is None:
                logits = hidden_chunk @ head.t()
            grad = ctx.kernels.loss_gradient(
                logits, labels[chunk], log_sums[chunk], grad_loss[chunk], grad_log_sum[chunk]
            )
            grad_hidden[chunk] = (grad @ head).to(hidden.dtype)
            grad_weight += grad.t() @ hidden_chunk
            del grad  # free both before the next chunk's logits
            logits = None
        if ctx.group is not None:
            grad_hidden = ctx.group.all_reduce_sum(grad_hidden)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(length: int, chunk_length: int) -> list[slice]:
    return [slice(start, start + chunk_length) for start in range(0, length, chunk_length)]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    kernels: LossKernels,
    group: VocabParallelGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats and log-sum-exp of the logits, per token.

    hidden [t, e], weight [v, e], labels [t] -> two [t]. With a group, v is the size of this rank's
    vocabulary shard. Peak memory is one chunk's logits (model.config.loss_chunk); the cost is one
    more forward of the head for all chunks but one. With a group the forward reduces 3 values per
    token over ranks, the backward the gradient of hidden. Labels are token ids; they are not
    checked, since a check would wait for the device.
    """
    chunk_length = loss_chunk(*hidden.shape)
    result: tuple[Tensor, Tensor] = LinearCrossEntropy.apply(
        hidden, weight, labels.long(), kernels, group, chunk_length
    )
    return result
