"""One sum over all ranks per step: losses, wishes, and how long each rank's own work took.

Cost: a gloo all-reduce of 2 x sources + 3 + ranks doubles; it is the loop's only collective beside
the engine's.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed import Ranks

WISHES = 3


@dataclass(frozen=True)
class Told:
    """What all ranks know of a step."""

    sums: list[list[float]]  # nats and tokens of each source
    leave: bool  # some rank has been asked to leave
    save: bool  # the first rank wants the save that failed to be tried again
    bad_data: bool  # some rank has found a shard that is not what its manifest says
    seconds: list[float]  # own work of each rank, per micro-batch

    @property
    def loss(self) -> float:
        """Mean loss over the tokens of the global batch, nats per token."""
        nats, tokens = self.sums
        return sum(nats) / sum(tokens)


class Exchange:
    """The collective of one run."""

    def __init__(self, ranks: Ranks, sources: int) -> None:
        self.ranks = ranks
        self.sources = sources

    def tell(self, sums: Tensor, seconds: float, leave: bool, save: bool, bad_data: bool) -> Told:
        """Exchange with all ranks; sums [2, sources] count once per tensor-parallel group."""
        losses = (
            sums.flatten()
            if self.ranks.tp_rank == 0
            else torch.zeros(2 * self.sources, dtype=torch.float64)
        )
        wishes = torch.tensor([leave, save, bad_data], dtype=torch.float64)
        times = torch.zeros(self.ranks.world_size, dtype=torch.float64)
        times[self.ranks.rank] = seconds
        everything = torch.cat([losses, wishes, times])
        dist.all_reduce(everything)
        losses, wishes, times = everything.split([2 * self.sources, WISHES, self.ranks.world_size])
        leave, save, bad_data = (wishes > 0).tolist()
        return Told(losses.view(2, -1).tolist(), leave, save, bad_data, times.tolist())


def count(sums: Tensor, source: Tensor, losses: Tensor) -> None:
    """Add a micro-batch's losses [b, l] and tokens to its sources' rows [b]; sums [2, sources]."""
    source = source.cpu()
    sums[0].index_add_(0, source, losses.double().sum(1).cpu())
    sums[1].index_add_(0, source, torch.full(source.shape, losses.shape[1], dtype=torch.float64))
