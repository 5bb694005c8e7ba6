"""ZeRO-0: everything on every rank, torch's AdamW and all_reduce, nothing else; what the other
engines must equal.

DeepSpeed's stage 0 is not used: under tensor parallelism it takes a wrong gradient norm, and in
fp32 it gives none.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from model.checkpoint import CheckpointReader, TensorShard
from model.mamba import FalconMamba
from train.config import Optim
from train.distributed import Ranks, data_parallel_group, tensor_parallel_group
from train.engines.protocol import (
    MOMENTS,
    Fragment,
    Weights,
    adamw,
    fill_state,
    load_tensor_shards,
    tensor_shards,
)


class PlainEngine:
    """20 bytes per parameter and rank: fp32 weights, gradients, two moments, a copy to reduce."""

    weights = Weights.REPLICATED
    needs_equal_micro_batches = False

    def __init__(self, model: FalconMamba, config: Optim, ranks: Ranks) -> None:
        self.model, self.ranks, self.clip_norm = model, ranks, config.clip_norm
        self.named = dict(model.named_parameters())
        self.optimizer = adamw(model, config)
        for parameter in self.named.values():
            fill_state(self.optimizer, parameter, updates=0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        loss.backward()
        if last:
            gradients = [
                parameter.grad for parameter in self.named.values() if parameter.grad is not None
            ]
            flat = torch.cat([gradient.view(-1) for gradient in gradients])
            dist.all_reduce(flat, group=data_parallel_group())
            for gradient, total in zip(
                gradients, flat.split([g.numel() for g in gradients]), strict=True
            ):
                gradient.copy_(total.view_as(gradient))

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """See Engine. A norm that is not finite skips the update of weights and moments."""
        norm = self._norm()
        finite = bool(torch.isfinite(norm))
        if finite:
            scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for parameter in self.named.values():
                assert parameter.grad is not None
                parameter.grad.mul_(scale)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.skip_step()
        return float(norm) if finite else float("inf"), not finite

    def skip_step(self) -> None:
        """See Engine."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """See Engine. Replicas share the writing: each has an even part of every parameter."""
        return tensor_shards(
            self._fragments(self.ranks.replica, self.ranks.replicas), self.model, self.ranks
        )

    def load(self, reader: CheckpointReader, updates: int) -> None:
        """See Engine."""
        for parameter in self.named.values():
            fill_state(self.optimizer, parameter, updates)
        load_tensor_shards(self._fragments(0, 1), reader, self.ranks)

    def _norm(self) -> Tensor:
        """Norm of the whole gradient; parameters not cut by tensor parallelism count once."""
        squares = torch.zeros((), device=self.ranks.device)
        for parameter in self.named.values():
            assert parameter.grad is not None
            if parameter.tensor_model_parallel or self.ranks.tp_rank == 0:  # type: ignore[attr-defined]
                squares += parameter.grad.square().sum()
        dist.all_reduce(squares, group=tensor_parallel_group())
        return squares.sqrt()

    def _fragments(self, part: int, parts: int) -> Iterator[Fragment]:
        for name, parameter in self.named.items():
            numel = parameter.numel()
            start, end = (numel * p // parts for p in (part, part + 1))
            if start < end:
                state = self.optimizer.state[parameter]
                moments = {kind: state[kind].view(-1)[start:end] for kind in MOMENTS}
                yield Fragment(name, start, parameter.data.view(-1)[start:end], moments)
