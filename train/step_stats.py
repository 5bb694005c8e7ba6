"""One all-reduce per step of losses, flags and every rank's compute time.

Cost: a gloo all-reduce of 2 x sources + 3 + ranks doubles, the training loop's only collective
besides the engine's.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed import Ranks

NUM_FLAGS = 3


@dataclass(frozen=True)
class StepStats:
    """Statistics of one step over all ranks."""

    sums: list[list[float]]  # [2, sources]: loss in nats, tokens
    stop: bool  # a rank has a stop request
    save: bool  # rank 0 wants to retry a failed save
    bad_data: bool  # a rank found a data shard that differs from its manifest
    compute_seconds: list[float]  # of each rank, per micro-batch

    @property
    def loss(self) -> float:
        """Mean loss over the tokens of the global batch, nats per token."""
        nats, tokens = self.sums
        return sum(nats) / sum(tokens)


def reduce_step_stats(
    ranks: Ranks, sums: Tensor, compute_seconds: float, stop: bool, save: bool, bad_data: bool
) -> StepStats:
    """All-reduce a step's statistics; sums [2, sources] count once per tensor-parallel group."""
    losses = sums.flatten() if ranks.tp_rank == 0 else torch.zeros_like(sums.flatten())
    flags = torch.tensor([stop, save, bad_data], dtype=torch.float64)
    seconds = torch.zeros(ranks.world_size, dtype=torch.float64)
    seconds[ranks.rank] = compute_seconds
    buffer = torch.cat([losses, flags, seconds])
    dist.all_reduce(buffer)
    losses, flags, seconds = buffer.split([losses.numel(), NUM_FLAGS, ranks.world_size])
    stop, save, bad_data = (flags > 0).tolist()
    return StepStats(losses.view(2, -1).tolist(), stop, save, bad_data, seconds.tolist())


def add_losses(sums: Tensor, source: Tensor, losses: Tensor) -> None:
    """Add a micro-batch's losses [b, l] and tokens to sums [2, sources], by source [b]."""
    source = source.cpu()
    sums[0].index_add_(0, source, losses.double().sum(1).cpu())
    sums[1].index_add_(0, source, torch.full(source.shape, losses.shape[1], dtype=torch.float64))
