"""Replicas: whether ranks hold the same weights, and updated their part of them alike.

Weights are compared between the backward and the update of a step, when every engine has gathered
what the step used. An update with another rate or by a faulty processor leaves no trace in gathered
weights, since only one rank owns each shard of the optimizer's state: so each rank's next neighbour
calculates a sample of its update again.
Cost, each health.check_replicas_every_steps: one pass over the weights, and 400 KB to a neighbour.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parameters import shard_spec
from train.config import Optim
from train.distributed import Ranks, data_parallel_group
from train.engines.protocol import MOMENTS, Engine, Weights

SAMPLES = 4096  # elements of a rank's update that its neighbour calculates again
COLUMNS = 6  # gradient, weight before, two moments before, decay (1 or 0), weight after


class ReplicaCheck:
    """The checks of one rank; all ranks call them together."""

    def __init__(self, model: nn.Module, engine: Engine, config: Optim, ranks: Ranks) -> None:
        self.model = model
        self.engine = engine
        self.config = config
        self.ranks = ranks
        self.numel = sum(
            tensor.numel() for shard, tensor in engine.state_shards() if shard.kind == "param"
        )

    def diverged_weights(self) -> list[int]:
        """Return the ranks whose weights differ from the master weights or from their replicas.

        Compares sums of bit patterns. Where every rank updates all weights itself (ZeRO-0), and for
        weights that ZeRO-3 keeps on every rank, most replicas are right.
        """
        sums = self._weight_sums().cpu()
        if self.engine.weights is not Weights.SHADOWED:
            return minority_ranks(sums, self.ranks)
        masters = self._master_sums().cpu()
        of_shards, of_whole = masters[:1], masters[1:]
        dist.all_reduce(of_shards, group=data_parallel_group())
        dist.all_reduce(of_whole)
        differs = (sums != torch.cat([of_shards, of_whole])).any()
        flags = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks.world_size)]
        dist.all_gather(flags, differs.long().view(1))
        return [rank for rank, flag in enumerate(flags) if flag]

    def _weight_sums(self) -> Tensor:
        """Sums over [tensor-parallel shards, whole tensors] of what this rank holds unsharded."""
        sums = torch.zeros(2, dtype=torch.int64, device=self.ranks.device)
        for name, weight in self.model.named_parameters():
            if weight.numel() > 1:  # ZeRO-3 leaves at most one element of a sharded weight
                sums[int(shard_spec(name) is None)] += bit_sum(weight)
        return sums

    def _master_sums(self) -> Tensor:
        weights = dict(self.model.named_parameters())
        sums = torch.zeros(2, dtype=torch.int64, device=self.ranks.device)
        for shard, tensor in self.engine.state_shards():
            if shard.kind == "param":
                master = tensor.to(weights[shard.name].dtype)
                sums[int(shard_spec(shard.name) is None)] += bit_sum(master)
        return sums

    @contextmanager
    def sampling(self, step: int) -> Iterator[list[Tensor]]:
        """Record a sample of the updates that torch's AdamW makes inside: rows of COLUMNS."""
        stride = max(1, -(-self.numel // SAMPLES))
        position = -step % stride  # other elements at every check
        rows: list[Tensor] = []

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            nonlocal position
            for parameter, decay in updated(optimizer):
                values = torch.arange(position, parameter.numel(), stride, device=parameter.device)
                position = (position - parameter.numel()) % stride
                state = optimizer.state[parameter]
                columns = [parameter.grad, parameter, *(state[kind] for kind in MOMENTS)]
                picked = [column.detach().reshape(-1)[values].double() for column in columns]
                rows.append(torch.stack([*picked, torch.full_like(picked[0], decay), picked[1]]))
                pending.append((parameter, values, rows[-1]))

        def after(*_: Any) -> None:
            for parameter, values, row in pending:
                row[-1] = parameter.detach().reshape(-1)[values].double()
            pending.clear()

        pending: list[tuple[Tensor, Tensor, Tensor]] = []
        optimizer = self.engine.optimizer
        handles = (
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        )
        try:
            yield rows
        finally:
            for handle in handles:
                handle.remove()

    def diverged_updates(
        self, rows: list[Tensor], lr: float, updates: int, facts: list[float]
    ) -> list[int]:
        """Return the ranks that updated otherwise than the others; the `updates`-th one.

        `facts` are numbers that all ranks must share, such as the gradient's norm. Ranks with other
        facts than most are named, or else each rank whose neighbour calculates another update.
        """
        values = torch.tensor([lr, float(updates), *facts], dtype=torch.float64)
        gathered = [torch.empty_like(values) for _ in range(self.ranks.world_size)]
        dist.all_gather(gathered, values)
        # as bits, since NaN differs from itself
        keys = [tuple(each.view(torch.int64).tolist()) for each in gathered]
        if others := [rank for rank, key in enumerate(keys) if 2 * keys.count(key) <= len(keys)]:
            return others
        sample = torch.zeros(COLUMNS, 2 * SAMPLES, dtype=torch.float64)
        if rows:
            taken = torch.cat(rows, 1).cpu()[:, : 2 * SAMPLES]
            sample[:, : taken.shape[1]] = taken
        differs = self._differs(self._from_previous(sample), lr, updates)
        flags = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks.world_size)]
        dist.all_gather(flags, torch.tensor([int(differs)]))
        return [(rank - 1) % len(flags) for rank, flag in enumerate(flags) if flag]

    def _from_previous(self, sample: Tensor) -> Tensor:
        """Send a tensor to the next rank; return that of the previous one."""
        rank, size = self.ranks.rank, self.ranks.world_size
        if size == 1:
            return sample
        received = torch.empty_like(sample)
        sending = dist.isend(sample, (rank + 1) % size)
        dist.recv(received, (rank - 1) % size)
        assert sending is not None
        sending.wait()
        return received

    def _differs(self, sample: Tensor, lr: float, updates: int) -> bool:
        """Whether any weight of a sample is not what AdamW makes of it with this rank's config."""
        gradient, weight, mean, square, decay, result = sample
        config = self.config
        decayed = weight * (1 - lr * config.weight_decay * decay)
        mean = config.beta1 * mean + (1 - config.beta1) * gradient
        square = config.beta2 * square + (1 - config.beta2) * gradient**2
        rate = lr / (1 - config.beta1**updates)
        root = square.sqrt() / (1 - config.beta2**updates) ** 0.5 + config.eps
        # fp32 rounds weight, moments and their quotient
        size = config.beta1 * sample[2].abs() + (1 - config.beta1) * gradient.abs()
        allowed = 1e-6 * weight.abs() + 1e-3 * rate * size / root + 1e-30
        return not bool(((result - (decayed - rate * mean / root)).abs() <= allowed).all())


def updated(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, float]]:
    """Yield the parameters with gradients, and 1.0 where weight decay applies."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter, float(group["weight_decay"] > 0)


def minority_ranks(sums: Tensor, ranks: Ranks) -> list[int]:
    """Return the ranks whose sums [of shards, of whole tensors] differ from most others'.

    Shards are compared among replicas, whole tensors among all ranks. Without a majority, all that
    differ are named.
    """
    gathered = [torch.zeros_like(sums) for _ in range(ranks.world_size)]
    dist.all_gather(gathered, sums)
    pairs = [tuple(pair.tolist()) for pair in gathered]
    found = []
    for rank, (of_shards, of_whole) in enumerate(pairs):
        replicas = [shards for shards, _ in pairs[rank % ranks.tp_size :: ranks.tp_size]]
        whole = [whole for _, whole in pairs]
        if 2 * replicas.count(of_shards) <= len(replicas) or (
            2 * whole.count(of_whole) <= len(whole)
        ):
            found.append(rank)
    return found


def bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bit patterns, modulo 2^64."""
    int_types = {4: torch.int32, 2: torch.int16}
    bits = tensor.detach().contiguous().view(int_types[tensor.element_size()])
    return bits.sum(dtype=torch.int64)
