"""Head and loss in one, so that all logits never exist: a chunk of tokens at a time, and again in the backward."""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from model.config import LOSS_CHUNK
from model.kernels.reference import computing_type


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy and log-sum-exp of hidden @ weight.T; the backward works in place on recomputed logits."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """hidden [t, e], weight [v, e], labels [t] -> losses and log-sums, both [t], in fp32 (fp64 for fp64)."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        losses, log_sums = (hidden.new_empty(len(labels), dtype=computing_type(hidden)) for _ in range(2))
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            for start in range(0, len(labels), chunk):
                rows = slice(start, start + chunk)
                logits = (hidden[rows].to(dtype) @ head.t()).to(losses.dtype)
                own = logits.gather(1, labels[rows, None]).squeeze(1)
                top = logits.amax(1, keepdim=True)
                log_sums[rows] = logits.sub_(top).exp_().sum(1).log_() + top.squeeze(1)
                losses[rows] = log_sums[rows] - own
        ctx.save_for_backward(hidden, weight, labels, log_sums)
        ctx.dtype, ctx.chunk = dtype, chunk  # type: ignore[attr-defined]
        return losses, log_sums

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor, grad_log_sum: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """d logits = (dloss + dlog_sum) softmax - dloss onehot; sums over chunks are taken in fp32."""
        hidden, weight, labels, log_sums = ctx.saved_tensors  # type: ignore[attr-defined]
        dtype, chunk = ctx.dtype, ctx.chunk  # type: ignore[attr-defined]
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=log_sums.dtype)
        head = weight.to(dtype)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            states = hidden[rows].to(dtype)
            grad = (states @ head.t()).to(log_sums.dtype)
            grad.sub_(log_sums[rows, None]).exp_().mul_((grad_loss + grad_log_sum)[rows, None])
            grad.scatter_add_(1, labels[rows, None], -grad_loss[rows, None])
            grad = grad.to(dtype)
            grad_hidden[rows] = (grad @ head).to(hidden.dtype)
            grad_weight += grad.t() @ states
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def linear_cross_entropy(hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy per token in nats and log of the softmax's sum: hidden [t, e], labels [t] -> both [t].

    Peak memory is LOSS_CHUNK x vocab_size logits, twice in the backward; the cost is one more forward of the head.
    """
    result: tuple[Tensor, Tensor] = LinearCrossEntropy.apply(hidden, head.weight, labels, LOSS_CHUNK)
    return result
