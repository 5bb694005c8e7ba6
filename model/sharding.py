"""The parts of parameters that tensor-parallel ranks hold."""

import torch
from torch import Tensor

from model.parameters import shard_spec


def shard(name: str, full: Tensor, rank: int, size: int) -> Tensor:
    """The part of a full parameter that tensor-parallel rank `rank` of `size` holds."""
    spec = shard_spec(name)
    if spec is None or size == 1:
        return full
    return torch.cat(
        [block.chunk(size, spec.dim)[rank] for block in full.chunk(spec.blocks, spec.dim)], spec.dim
    )


def unshard(name: str, shards: list[Tensor]) -> Tensor:
    """Full parameter from the parts of all tensor-parallel ranks in order; inverse of shard."""
    spec = shard_spec(name)
    if spec is None or len(shards) == 1:
        return shards[0]
    by_part = zip(*(piece.chunk(spec.blocks, spec.dim) for piece in shards), strict=True)
    return torch.cat([piece for block in by_part for piece in block], spec.dim)
