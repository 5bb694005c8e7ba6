"""Context parallelism: each rank holds one chunk of every sequence.

The convolution needs the last k - 1 inputs of the previous rank. The scan needs the state there:
every rank first scans its chunk from a zero state, all ranks gather the chunks' last states and
total time steps, and each combines those of the chunks before its own. A chunk multiplies the state
that enters it by exp(A time), or by 0 if a document starts in it. Gradients flow back through the
same all-gather.

Cost per layer: the scan runs twice, forward and backward; d_inner (d_state + k) values per sequence
and rank are gathered, independent of the length; both scans save their states. Times and the
combined state are cheap and recomputed in the backward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.kernels.carry import final_conv_state
from model.kernels.interface import SelectiveScan

RESET_TIME = 1e30  # total time of a chunk in which a document starts: exp(A RESET_TIME) is 0


class AllGatherStack(torch.autograd.Function):
    """All-gather into a new first axis; the backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """x [...] -> [ranks, ...]."""
        ctx.group = group
        gathered = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(gathered, x.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """[ranks, ...] -> [...]."""
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


class ContextRanks:
    """The ranks that hold chunks of the same sequences, in the order of the chunks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()

    def local_chunk(self, x: Tensor) -> Tensor:
        """Return this rank's chunk of x [b, l, ...]; ValueError if the ranks do not divide l."""
        if x.shape[1] % self.size:
            raise ValueError(
                f"parallel.context_parallel {self.size} does not divide the {x.shape[1]} tokens "
                "of a sequence"
            )
        return x.chunk(self.size, 1)[self.rank]

    def previous_conv_state(self, x: Tensor, doc_starts: Tensor | None, width: int) -> Tensor:
        """Return the `width` inputs [b, width, d] before x [b, l, d]; ValueError if l < width."""
        if x.shape[1] < width:
            raise ValueError(
                f"a rank has {x.shape[1]} tokens of each sequence, the convolution needs the last "
                f"{width} of the previous rank: lower parallel.context_parallel"
            )
        gathered = AllGatherStack.apply(final_conv_state(x, doc_starts, None, width), self.group)
        # the first rank starts from zeros, but must enter the backward's all-reduce
        return gathered[self.rank - 1] if self.rank else gathered[0] * 0.0

    def initial_ssm_state(
        self,
        scan: SelectiveScan,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        doc_starts: Tensor | None,
    ) -> Tensor:
        """Return the state [b, d, n] before this rank's chunk; arguments are those of the scan."""
        _, last_state = scan(u, dt, A, B, C, D, z, dt_bias, doc_starts)
        time = checkpoint(chunk_time, dt, dt_bias, last_state.dtype, use_reentrant=False)
        if doc_starts is not None:
            time = time.masked_fill(doc_starts.any(1)[:, None], RESET_TIME)
        chunks = AllGatherStack.apply(torch.cat([last_state, time.unsqueeze(-1)], -1), self.group)
        return checkpoint(combine_chunks, A, chunks, self.rank, use_reentrant=False)


def chunk_time(dt: Tensor, dt_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum [b, d] of a chunk's time steps; dt [b, l, d] is the scan's argument."""
    return F.softplus(dt.to(dtype) + dt_bias).sum(1)


def combine_chunks(A: Tensor, chunks: Tensor, rank: int) -> Tensor:
    """Return the state [b, d, n] before chunk `rank`.

    chunks [ranks, b, d, n + 1] hold each chunk's last state and, in the last column, its time.
    """
    state = (
        chunks[0, ..., :-1] * 0.0
    )  # not zeros(): every rank must enter the backward's all-reduce
    for index in range(rank):
        state = torch.exp(A * chunks[index, ..., -1:]) * state + chunks[index, ..., :-1]
    return state
