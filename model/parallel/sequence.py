"""Sequence parallelism: residual stream and norms sharded along the sequence over TP ranks.

With tensor parallelism alone, every rank holds the same residual stream. Here each rank holds only
its tokens of it (Korthikanti et al., arXiv 2205.05198): the all-reduce after out_proj becomes a
reduce-scatter, with an all-gather before in_proj; together they send as many bytes. The backward
gathers in_proj's input again instead of saving it. The scan sees whole sequences. megatron-core's
own functions allocate on CUDA only and shard the first axis, which is the batch here.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.nn import functional as F

from model.kernels.reference import matmul_dtype
from model.mamba import RMSNorm
from model.parallel.tensor import ColumnParallel, RowParallel, VocabParallelEmbedding


def all_gather(x: Tensor) -> Tensor:
    """All-gather along the sequence: x [b, l / size, ...] -> [b, l, ...]."""
    group = parallel_state.get_tensor_model_parallel_group()
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered.transpose(0, 1).flatten(1, 2)


def reduce_scatter(x: Tensor) -> Tensor:
    """Sum over ranks and scatter along the sequence: x [b, l, ...] -> [b, l / size, ...]."""
    group = parallel_state.get_tensor_model_parallel_group()
    chunks = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(chunks[0])
    dist.reduce_scatter_tensor(out, chunks.flatten(0, 1), group=group)
    return out


def local_chunk(x: Tensor) -> Tensor:
    """Return this rank's tokens of x [b, l, ...]."""
    group = parallel_state.get_tensor_model_parallel_group()
    return x.chunk(group.size(), 1)[group.rank()].contiguous()


class SplitSequence(torch.autograd.Function):
    """Take this rank's tokens; the backward all-gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [b, l, ...] -> [b, l / size, ...]."""
        return local_chunk(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient of forward."""
        return all_gather(grads[0])


class GatherSequence(torch.autograd.Function):
    """All-gather, for a consumer whose gradient is the same on every rank; the backward splits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [b, l / size, ...] -> [b, l, ...]."""
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient of forward."""
        return local_chunk(grads[0])


class ReduceScatterSequence(torch.autograd.Function):
    """Reduce-scatter of partial sums; the backward all-gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [b, l, ...] -> [b, l / size, ...]."""
        return reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient of forward."""
        return all_gather(grads[0])


class AllGatherMatmul(torch.autograd.Function):
    """All-gather x and multiply; the backward gathers x again instead of saving it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x [b, l / size, e], weight [d, e] -> [b, l, d]."""
        ctx.save_for_backward(x, weight)
        return all_gather(x) @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of forward."""
        x, weight = ctx.saved_tensors
        grad = grads[0]
        return reduce_scatter(grad @ weight), grad.flatten(0, 1).t() @ all_gather(x).flatten(0, 1)


class AllGatherColumnParallel(ColumnParallel):
    """in_proj: this rank's tokens -> this rank's features of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, l / size, inputs] -> [b, l, outputs / size]."""
        dtype = matmul_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = AllGatherMatmul.apply(x.to(dtype), self.weight.to(dtype))
        return y


class ReduceScatterRowParallel(RowParallel):
    """out_proj: this rank's features of all tokens -> its tokens of the sum over ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, l, inputs / size] -> [b, l / size, outputs]."""
        y: Tensor = ReduceScatterSequence.apply(F.linear(x, self.weight))
        return y


class SequenceParallelEmbedding(VocabParallelEmbedding):
    """Embedding whose output is this rank's tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, l] -> [b, l / size, e]."""
        h: Tensor = SplitSequence.apply(super().forward(tokens))
        return h


class SequenceParallelNorm(RMSNorm):
    """RMSNorm of this rank's tokens; the backward all-reduces the weight's gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, l / size, e] -> [b, l / size, e]."""
        weight = copy_to_tensor_model_parallel_region(self.weight)
        return self.kernels.rms_norm(x, weight, self.eps, dtype=matmul_dtype(x))


class GatheredFinalNorm(SequenceParallelNorm):
    """The final norm, followed by the all-gather that gives lm_head whole sequences."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, l / size, e] -> [b, l, e]."""
        y: Tensor = GatherSequence.apply(super().forward(x))
        return y
