"""Counts collectives from any caller: DeepSpeed, megatron-core, autograd or the training loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPERATIONS = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
}


@dataclass
class Count:
    """Calls of one operation on one group, and bytes of the full tensors reduced or gathered."""

    ranks: int
    calls: int = 0
    size: int = 0


class CollectiveCounter(TorchDispatchMode):
    """Counts torch.distributed's operations by (group, operation), without groups of one rank.

    Groups are tensor, context, replicas, optimizer (ranks that share a megatron-core optimizer) and
    world. Operations in the backward count too, since on CPU it runs in the calling thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[str, str], Count] = {}
        self.multiplier = 1  # calls that each call stands for

    def reset(self) -> dict[tuple[str, str], Count]:
        """Return the counts so far and start again from zero."""
        counts = self.counts
        self.counts = {}
        return counts

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count a collective and execute it."""
        if function.namespace == "c10d":
            self._count(function.__name__.split(".")[0], args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        boxed = next(
            arg
            for arg in args
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
        )
        group = dist.ProcessGroup.unbox(boxed)
        if group.size() == 1:
            return
        tensors = [[x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args]
        size = max(sum(x.numel() * x.element_size() for x in each) for each in tensors)
        key = (group_name(group), OPERATIONS.get(name, name.strip("_")))
        count = self.counts.setdefault(key, Count(group.size()))
        count.calls += self.multiplier
        count.size += self.multiplier * size


def group_name(group: dist.ProcessGroup) -> str:
    """Name of a group by its role; different groups of the same ranks have different names."""
    from megatron.core import parallel_state

    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "replicas": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "optimizer": parallel_state.get_intra_distributed_optimizer_instance_group(),
        "world": dist.group.WORLD,
    }
    return next((name for name, other in groups.items() if other == group), "other")
