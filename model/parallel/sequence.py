"""Sequence parallelism: under tensor parallelism, residual and norms cut along the sequence.

Where the mixer's channels are cut, what lies between mixers is the same on every rank. Here each
rank keeps its tokens of it alone (Korthikanti et al., arXiv 2205.05198): the sum over ranks after
out_proj becomes a reduce-scatter, and before in_proj comes an all-gather, together as many bytes as
the sum; the backward gathers in_proj's input once more instead of keeping it whole. The scan sees
whole sequences. megatron-core has the same functions; they allocate on CUDA alone and cut the first
axis, here the batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.nn import functional as F

from model.kernels.reference import product_type
from model.mamba import RMSNorm
from model.parallel.tensor import ColumnParallel, RowParallel, VocabParallel


def gather(x: Tensor) -> Tensor:
    """The sequences whose tokens the ranks hold: x [b, l / size, ...] -> [b, l, ...]."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=group)
    return parts.transpose(0, 1).flatten(1, 2)


def scatter_sum(x: Tensor) -> Tensor:
    """The sum over ranks, of it this rank's tokens: x [b, l, ...] -> [b, l / size, ...]."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(out, parts.flatten(0, 1), group=group)
    return out


def own(x: Tensor) -> Tensor:
    """This rank's tokens of x [b, l, ...], which is the same on every rank."""
    group = parallel_state.get_tensor_model_parallel_group()
    return x.chunk(group.size(), 1)[group.rank()].contiguous()


class Split(torch.autograd.Function):
    """Own tokens of what every rank holds; the gradient is whole again on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [b, l, ...] -> [b, l / size, ...]."""
        return own(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """See forward."""
        return gather(grads[0])


class Join(torch.autograd.Function):
    """Whole sequences on every rank, for a consumer whose gradient is whole on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [b, l / size, ...] -> [b, l, ...]."""
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """See forward."""
        return own(grads[0])


class ScatterSum(torch.autograd.Function):
    """The sum of partial results, cut along the sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [b, l, ...] -> [b, l / size, ...]."""
        return scatter_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """See forward."""
        return gather(grads[0])


class GatheredProduct(torch.autograd.Function):
    """Gathered x times a weight; saves this rank's tokens, gathers again for weight gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x [b, l / size, e], weight [d, e] -> [b, l, d]."""
        ctx.save_for_backward(x, weight)
        return gather(x) @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """See forward."""
        x, weight = ctx.saved_tensors
        grad = grads[0]
        return scatter_sum(grad @ weight), grad.flatten(0, 1).t() @ gather(x).flatten(0, 1)


class GatheredColumnParallel(ColumnParallel):
    """in_proj: takes this rank's tokens, gives this rank's features of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, l / size, inputs] -> [b, l, outputs / size]."""
        dtype = product_type(x)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = GatheredProduct.apply(x.to(dtype), self.weight.to(dtype))
        return y


class ScatteredRowParallel(RowParallel):
    """out_proj: this rank's features of all tokens -> its tokens of the sum over ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, l, inputs / size] -> [b, l / size, outputs]."""
        y: Tensor = ScatterSum.apply(F.linear(x, self.weight))
        return y


class SplitVocabParallel(VocabParallel):
    """Embedding that gives this rank's tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, l] -> [b, l / size, e]."""
        h: Tensor = Split.apply(super().forward(tokens))
        return h


class SequenceNorm(RMSNorm):
    """RMSNorm of this rank's tokens; each backward sums the weight's gradient over ranks once."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, l / size, e] -> [b, l / size, e]."""
        weight = copy_to_tensor_model_parallel_region(self.weight)
        return self.kernels.rms_norm(x, weight, self.eps, dtype=product_type(x))


class JoinedNorm(SequenceNorm):
    """The last norm, after which every rank has whole sequences again."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, l / size, e] -> [b, l, e]."""
        y: Tensor = Join.apply(super().forward(x))
        return y
