"""Backward, reduction, clipping and update behind one small protocol, here over DeepSpeed's ZeRO.

What a step means (loss, batch, rate, order of data) is decided outside. State goes in and out by parameter name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.flops import parameter_shapes
from model.init import decays
from model.mamba import FalconMamba
from model.parallel import cut_of
from model.weights import Piece, Pieces
from train.config import Optim
from train.distributed import Mpu, Ranks
from train.plan import REDUCE_BUCKET

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """What the training loop asks of an engine."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`; `last` marks this rank's last micro-batch of the step, on which ranks reduce."""

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """Clip, update at rate lr, clear gradients; returns the global norm before clipping, and whether it skipped."""

    def discard(self) -> None:
        """Forget the gradients of the step; weights and moments stay byte for byte. Instead of clip_and_step."""

    def pieces(self) -> Iterator[tuple[Piece, Tensor]]:
        """This rank's part of weights and optimizer state, flat fp32; views, which the next step changes."""

    def load(self, pieces: Pieces, updates: int) -> None:
        """Take this rank's part out of a checkpoint made after `updates` updates."""


@dataclass
class Fragment:
    """A range of a parameter whose master weights and moments this rank owns."""

    name: str
    start: int
    master: Tensor
    moments: dict[str, Tensor]


class ZeroEngine:
    """DeepSpeed ZeRO-1: fp32 parameters and gradients on every rank, AdamW state cut over data-parallel ranks.

    The gradient is the sum of what `backward` is given over all ranks: callers weight their losses so that this is the
    mean over the tokens of the global batch, however unequally ranks hold them.
    """

    def __init__(self, model: FalconMamba, config: Optim, ranks: Ranks) -> None:
        deepspeed = _deepspeed(ranks.device.type)
        self.ranks = ranks
        self.model = model
        self.shapes = parameter_shapes(model.config)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        named = list(model.named_parameters())
        groups = [
            {"params": [p for name, p in named if decays(name)], "weight_decay": config.weight_decay},
            {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps)
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # asked for, and used for nothing but its own log
            "gradient_clipping": config.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": 1,
                "reduce_bucket_size": REDUCE_BUCKET,
                "allgather_bucket_size": REDUCE_BUCKET,
                "overlap_comm": ranks.device.type == "cuda",
            },
        }
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=Mpu(), dist_init_required=False
        )
        self.zero = self.engine.optimizer
        self._fill_state(updates=0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine. DeepSpeed averages over data-parallel ranks; the factor turns that into a sum."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks.replicas, scale_wrt_gas=False)

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """See Engine. A norm that is not finite skips the update and leaves weights and moments as they are."""
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), bool(self.zero.overflow)

    def discard(self) -> None:
        """See Engine. Gradients made infinite take DeepSpeed's own way of skipping an update."""
        for gradients in self.zero.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.fill_(float("inf"))
        self.engine.step()
        assert self.zero.overflow

    def pieces(self) -> Iterator[tuple[Piece, Tensor]]:
        """See Engine. A parameter that is not cut is written by tensor-parallel rank 0 alone."""
        for fragment in self._fragments():
            if cut_of(fragment.name) is None and self.ranks.tp_rank > 0:
                continue
            for kind, tensor in {"param": fragment.master, **fragment.moments}.items():
                piece = Piece(
                    kind=kind,
                    name=fragment.name,
                    shape=self.shapes[fragment.name],
                    tp_rank=self.ranks.tp_rank,
                    tp_size=self.ranks.tp_size,
                    start=fragment.start,
                    numel=tensor.numel(),
                )
                yield piece, tensor.detach()

    def load(self, pieces: Pieces, updates: int) -> None:
        """See Engine."""
        self._fill_state(updates)
        where = (self.ranks.tp_rank, self.ranks.tp_size)
        with torch.no_grad():
            for fragment in self._fragments():
                for kind, tensor in {"param": fragment.master, **fragment.moments}.items():
                    tensor.copy_(pieces.range(kind, fragment.name, *where, fragment.start, tensor.numel()))
        self.zero.update_lp_params()

    def _fill_state(self, updates: int) -> None:
        """Make AdamW's state at once: torch would make it at the first update, and a checkpoint may come before."""
        for flat in self.zero.single_partition_of_fp32_groups:
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            self.zero.optimizer.state[flat] = {"step": torch.tensor(float(updates)), **moments}

    def _fragments(self) -> Iterator[Fragment]:
        """What this rank owns, read from the links that DeepSpeed keeps from each parameter to its flat masters.

        Its own links to the moments are made after the first group's update and lack those of the other groups.
        """
        for group, flat in zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True):
            state = self.zero.optimizer.state[flat]
            for parameter in group:
                link = parameter._hp_mapping
                if link is not None:
                    at = link.hp_fragment_address
                    moments = {kind: state[kind].narrow(0, at.start, at.numel) for kind in MOMENTS}
                    yield Fragment(
                        self.names[id(parameter)], link.lp_fragment_address.start, link.hp_fragment.data, moments
                    )


def _deepspeed(device: str) -> Any:
    """DeepSpeed, quiet, and without the shared-memory collective that it would compile with g++ for minutes."""
    import logging
    import os

    os.environ["DS_ACCELERATOR"] = device  # it would guess, and warn that it did

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # a killed compile leaves a lock file on which every later run hangs for ever; setting the whole table also spares
    # the probing of every op, which runs compilers
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed
