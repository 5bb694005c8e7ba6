"""The parts of parameters that tensor-parallel ranks hold."""

import torch
from torch import Tensor

from model.parameters import cut_of


def shard(name: str, full: Tensor, rank: int, size: int) -> Tensor:
    """The part of a full parameter that tensor-parallel rank `rank` of `size` holds."""
    cut = cut_of(name)
    if cut is None or size == 1:
        return full
    return torch.cat(
        [part.chunk(size, cut.dim)[rank] for part in full.chunk(cut.parts, cut.dim)], cut.dim
    )


def unshard(name: str, shards: list[Tensor]) -> Tensor:
    """Full parameter from the parts of all tensor-parallel ranks in order; inverse of shard."""
    cut = cut_of(name)
    if cut is None or len(shards) == 1:
        return shards[0]
    by_part = zip(*(piece.chunk(cut.parts, cut.dim) for piece in shards), strict=True)
    return torch.cat([piece for part in by_part for piece in part], cut.dim)
