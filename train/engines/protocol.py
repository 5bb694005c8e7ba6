"""Backward, reduction, clipping and update behind one small protocol, and the engines that follow
it.

What a step means (loss, batch, rate, order of data) is decided outside. State goes in and out by
parameter name, so a run can go on with another engine. The gradient is the sum of what `backward`
is given over all ranks: callers weight their losses so that this is the mean over the tokens of the
global batch, however unequally ranks hold them.
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
from train.distributed import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class Weights(Enum):
    """How the weights of data-parallel ranks relate to each other."""

    REPLICATED = "replicated"  # every rank updates a whole copy itself
    SHADOWED = "shadowed"  # every rank has a whole copy of master weights that are sharded
    SHARDED = "sharded"  # every rank has its own shard only


class Engine(Protocol):
    """What the training loop asks of an engine."""

    weights: Weights
    # whether every micro-batch has collectives, so that all ranks need equally many of them
    needs_equal_micro_batches: bool

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`; ranks reduce on the `last` micro-batch of their step."""

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """Clip, update at lr, clear gradients; returns the unclipped global norm and if skipped."""

    def skip_step(self) -> None:
        """In place of clip_and_step: drop gradients; weights and moments stay byte for byte."""

    def state_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """This rank's weights and optimizer state, flat fp32 views; the next step changes them."""

    def load(self, reader: CheckpointReader, updates: int) -> None:
        """Take this rank's part out of a checkpoint made after `updates` updates."""


class Fragment:
    """A range of a parameter whose master weights and moments this rank owns."""

    def __init__(self, name: str, start: int, master: Tensor, moments: dict[str, Tensor]) -> None:
        self.name, self.start = name, start
        self.tensors = {"param": master, **moments}


def adamw(model: FalconMamba, config: Optim) -> torch.optim.AdamW:
    """AdamW with weight decay where model.parameters.decays says so; every update sets its rate."""
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
    """Create a tensor's AdamW state; torch waits for an update, and a save may come first."""
    moments = {kind: torch.zeros_like(tensor) for kind in MOMENTS}
    optimizer.state[tensor] = {"step": torch.tensor(float(updates)), **moments}


def tensor_shards(
    fragments: Iterator[Fragment], model: FalconMamba, ranks: Ranks
) -> Iterator[tuple[TensorShard, Tensor]]:
    """Fragments for a checkpoint; only tensor-parallel rank 0 writes parameters not cut."""
    shapes = parameter_shapes(model.config)
    for fragment in fragments:
        if shard_spec(fragment.name) is None and ranks.tp_rank > 0:
            continue
        for kind, tensor in fragment.tensors.items():
            shard = TensorShard(
                kind=kind,
                name=fragment.name,
                shape=shapes[fragment.name],
                tp_rank=ranks.tp_rank,
                tp_size=ranks.tp_size,
                start=fragment.start,
                numel=tensor.numel(),
            )
            yield shard, tensor.detach()


def load_tensor_shards(
    fragments: Iterator[Fragment], reader: CheckpointReader, ranks: Ranks
) -> None:
    """Copy a checkpoint's values into fragments; inverse of pieces_of."""
    with torch.no_grad():
        for fragment in fragments:
            for kind, tensor in fragment.tensors.items():
                where = (ranks.tp_rank, ranks.tp_size, fragment.start, tensor.numel())
                tensor.copy_(reader.read_range(kind, fragment.name, *where))
