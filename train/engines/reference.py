"""ZeRO-0 in plain torch: AdamW and one all-reduce. The reference for the other engines.

DeepSpeed's stage 0 is not used: its gradient norm is wrong under tensor parallelism, and in fp32 it
returns none.
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
    ParamShard,
    Weights,
    adamw,
    fill_state,
    load_tensor_shards,
    tensor_shards,
)


class PlainEngine:
    """20 bytes per parameter: fp32 weights, gradients, two moments, a flat copy to reduce."""

    weights = Weights.REPLICATED
    needs_equal_micro_batches = False

    def __init__(self, model: FalconMamba, config: Optim, ranks: Ranks) -> None:
        self.model = model
        self.ranks = ranks
        self.clip_norm = config.clip_norm
        self.parameters = dict(model.named_parameters())
        self.optimizer: torch.optim.Optimizer = adamw(model, config)
        for parameter in self.parameters.values():
            fill_state(self.optimizer, parameter, updates=0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        loss.backward()
        if last:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            flat = torch.cat([gradient.view(-1) for gradient in gradients])
            dist.all_reduce(flat, group=data_parallel_group())
            reduced = flat.split([gradient.numel() for gradient in gradients])
            for gradient, total in zip(gradients, reduced, strict=True):
                gradient.copy_(total.view_as(gradient))

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """See Engine."""
        norm = self._gradient_norm()
        is_finite = bool(torch.isfinite(norm))
        if is_finite:
            scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad.mul_(scale)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.skip_step()
        return float(norm) if is_finite else float("inf"), not is_finite

    def skip_step(self) -> None:
        """See Engine."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """See Engine. Replicas share the writing: each yields an even range of every parameter."""
        shards = self._param_shards(self.ranks.replica_rank, self.ranks.num_replicas)
        return tensor_shards(shards, self.model, self.ranks)

    def load(self, reader: CheckpointReader, updates: int) -> None:
        """See Engine."""
        for parameter in self.parameters.values():
            fill_state(self.optimizer, parameter, updates)
        load_tensor_shards(self._param_shards(0, 1), self.model, reader, self.ranks)

    def _gradient_norm(self) -> Tensor:
        """Global L2 norm; parameters that tensor parallelism replicates count once."""
        squares = torch.zeros((), device=self.ranks.device)
        for parameter in self.parameters.values():
            assert parameter.grad is not None
            if parameter.tensor_model_parallel or self.ranks.tp_rank == 0:  # type: ignore[attr-defined]
                squares += parameter.grad.square().sum()
        dist.all_reduce(squares, group=tensor_parallel_group())
        return squares.sqrt()

    def _param_shards(self, index: int, count: int) -> Iterator[ParamShard]:
        """Yield the `index`-th of `count` even ranges of every parameter."""
        for name, parameter in self.parameters.items():
            numel = parameter.numel()
            start, end = numel * index // count, numel * (index + 1) // count
            if start < end:
                state = self.optimizer.state[parameter]
                moments = {kind: state[kind].view(-1)[start:end] for kind in MOMENTS}
                yield ParamShard(name, start, parameter.data.view(-1)[start:end], moments)
