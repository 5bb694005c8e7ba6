"""A sequence split over ranks: each holds a piece, and learns from the pieces before it what its
own begins with.

The convolution needs the last k - 1 inputs of the rank before. The scan needs the state there:
every rank runs its piece once from zero, all exchange what they end with and the time that passes
in them, and each joins the pieces before its own (a piece multiplies what enters it by exp(A time),
and by nothing where a document opens in it). Gradients go the same way back. Costs per layer: the
scan twice, forward and backward; d_inner (d_state + k) values per sequence and rank gathered over
the ranks, whatever the length; the states of both scans kept. What is little work, time and
joining, is computed again in the backward instead of kept.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.kernels.carry import final_conv_state
from model.kernels.interface import SelectiveScan

FOREVER = 1e30  # time that passes in a piece in which a document opens: exp(A FOREVER) is 0


class Gather(torch.autograd.Function):
    """x of every rank of a group, stacked; the backward sums what all ranks ask of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """x [...] -> [ranks, ...]."""
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """See forward."""
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


class ContextRanks:
    """The ranks that hold the pieces of the same sequences, in the order of the pieces."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()

    def local_chunk(self, x: Tensor) -> Tensor:
        """This rank's tokens of x [b, l, ...]; raises ValueError when the ranks do not divide l."""
        if x.shape[1] % self.size:
            raise ValueError(
                f"parallel.context_parallel {self.size} does not divide the {x.shape[1]} tokens "
                "of a sequence"
            )
        return x.chunk(self.size, 1)[self.rank]

    def conv_state(self, x: Tensor, doc_starts: Tensor | None, behind: int) -> Tensor:
        """The `behind` inputs [b, behind, d] before x [b, l, d]; ValueError if l < behind."""
        if x.shape[1] < behind:
            raise ValueError(
                f"a rank's {x.shape[1]} tokens are fewer than the {behind} that a convolution "
                "looks back"
            )
        gathered = Gather.apply(final_conv_state(x, doc_starts, None, behind), self.group)
        # the first rank has nothing before it; it takes part in the gradient's sum all the same
        return gathered[self.rank - 1] if self.rank else gathered[0] * 0.0

    def state(
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
        """The scan's state [b, d, n] before this rank's piece; arguments as of the scan."""
        _, end = scan(u, dt, A, B, C, D, z, dt_bias, doc_starts)
        time = checkpoint(time_of, dt, dt_bias, end.dtype, use_reentrant=False)
        if doc_starts is not None:
            time = time.masked_fill(doc_starts.any(1)[:, None], FOREVER)
        pieces = Gather.apply(torch.cat([end, time.unsqueeze(-1)], -1), self.group)
        return checkpoint(join, A, pieces, self.rank, use_reentrant=False)


def time_of(dt: Tensor, dt_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The time [b, d] that passes in a piece, dt [b, l, d] as the scan takes it."""
    return F.softplus(dt.to(dtype) + dt_bias).sum(1)


def join(A: Tensor, pieces: Tensor, rank: int) -> Tensor:
    """State [b, d, n] before piece `rank`; pieces hold last states and times (last column)."""
    state = pieces[0, ..., :-1] * 0.0  # as in taps: every rank is part of the gradient's sum
    for before in range(rank):
        state = torch.exp(A * pieces[before, ..., -1:]) * state + pieces[before, ..., :-1]
    return state
