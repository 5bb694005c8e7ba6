"""The Engine protocol: backward, gradient reduction, clipping and update; helpers for engines.

Loss, batch, learning rate and data order are decided outside. State goes in and out by parameter
name, so a run can change its engine at any checkpoint. Engines sum gradients over all ranks. The
caller weights its losses so that this sum is the mean over the tokens of the global batch, however
unequal the ranks' micro-batches are.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from model.checkpoint import CheckpointReader, TensorShard
from model.flops import parameter_shapes
from model.mamba import FalconMamba
from model.parameters import has_weight_decay, shard_spec
from train.config import Optim
from train.distributed import Ranks, errors_on_all_ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class Weights(Enum):
    """How data-parallel ranks hold the weights."""

    REPLICATED = "replicated"  # every rank updates all weights itself
    SHADOWED = "shadowed"  # every rank has all weights, gathered from sharded master weights
    SHARDED = "sharded"  # every rank has a shard only


class Engine(Protocol):
    """Interface between the training loop and an engine."""

    weights: Weights
    optimizer: torch.optim.Optimizer  # updates the master weights that this rank owns
    # every micro-batch has collectives, so all ranks must run equally many
    needs_equal_micro_batches: bool

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of `loss`; `last` marks the last micro-batch of a step."""

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """Clip, update, clear gradients; return the unclipped global norm and if it was skipped.

        A norm that is not finite skips the update and is returned as infinity.
        """

    def skip_step(self) -> None:
        """Clear gradients in place of clip_and_step; weights and moments keep every bit."""

    def state_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """Yield this rank's weights and moments as flat fp32 views, valid until the next step."""

    def load(self, reader: CheckpointReader, updates: int) -> None:
        """Load this rank's weights and moments from a checkpoint made after `updates` updates."""


class ParamShard:
    """A flat range of a parameter whose master weights and moments this rank owns."""

    def __init__(self, name: str, start: int, master: Tensor, moments: dict[str, Tensor]) -> None:
        self.name = name
        self.start = start
        self.tensors = {"param": master, **moments}


def adamw(model: FalconMamba, config: Optim) -> torch.optim.AdamW:
    """Build torch's AdamW with two groups, with and without weight decay; engines set the lr."""
    named = list(model.named_parameters())
    groups = [
        {
            "params": [p for name, p in named if has_weight_decay(name)],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in named if not has_weight_decay(name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps)


def fill_state(optimizer: torch.optim.Optimizer, tensor: Tensor, updates: int) -> None:
    """Create a tensor's AdamW state, which torch itself creates only at the first update."""
    moments = {kind: torch.zeros_like(tensor) for kind in MOMENTS}
    optimizer.state[tensor] = {"step": torch.tensor(float(updates)), **moments}


def tensor_shards(
    param_shards: Iterator[ParamShard], model: FalconMamba, ranks: Ranks
) -> Iterator[tuple[TensorShard, Tensor]]:
    """Yield tensors for a checkpoint; only tensor-parallel rank 0 writes replicated parameters."""
    shapes = parameter_shapes(model.config)
    for param_shard in param_shards:
        if shard_spec(param_shard.name) is None and ranks.tp_rank > 0:
            continue
        for kind, tensor in param_shard.tensors.items():
            shard = TensorShard(
                kind=kind,
                name=param_shard.name,
                shape=shapes[param_shard.name],
                tp_rank=ranks.tp_rank,
                tp_size=ranks.tp_size,
                start=param_shard.start,
                numel=tensor.numel(),
            )
            yield shard, tensor.detach()


def load_tensor_shards(
    param_shards: Iterator[ParamShard], model: FalconMamba, reader: CheckpointReader, ranks: Ranks
) -> None:
    """Copy a checkpoint's values into a rank's tensors; inverse of tensor_shards.

    Raises InputError on every rank if the checkpoint is of another model, or if one rank finds
    values that cannot be.
    """
    with errors_on_all_ranks(), torch.no_grad():
        reader.require(parameter_shapes(model.config))
        for shard in param_shards:
            for kind, tensor in shard.tensors.items():
                values = reader.read_range(
                    kind, shard.name, ranks.tp_rank, ranks.tp_size, shard.start, tensor.numel()
                )
                tensor.copy_(values)
