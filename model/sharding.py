"""Shard parameters over tensor-parallel ranks, and back."""

import torch
from torch import Tensor

from model.parameters import shard_spec


def shard(name: str, full: Tensor, rank: int, size: int) -> Tensor:
    """Return the shard of a full parameter that rank `rank` of `size` holds."""
    spec = shard_spec(name)
    if spec is None or size == 1:
        return full
    return torch.cat(
        [block.chunk(size, spec.dim)[rank] for block in full.chunk(spec.blocks, spec.dim)], spec.dim
    )


def unshard(name: str, shards: list[Tensor]) -> Tensor:
    """Return the full parameter from all ranks' shards in order; inverse of shard."""
    spec = shard_spec(name)
    if spec is None or len(shards) == 1:
        return shards[0]
    blocks = zip(*(part.chunk(spec.blocks, spec.dim) for part in shards), strict=True)
    return torch.cat([part for block in blocks for part in block], spec.dim)
