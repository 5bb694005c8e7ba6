"""Counts collectives, whoever calls them: DeepSpeed, megatron-core, autograd or our loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = {
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
    """Calls of one operation on one group, and the bytes of what they reduce or gather."""

    ranks: int
    calls: int = 0
    size: int = 0


class Collectives(TorchDispatchMode):
    """Within it, torch.distributed's operations are counted by (group, operation); groups of one
    rank are left out.

    Groups are named tensor, context, replicas, optimizer (all ranks that share one of
    megatron-core's) and world. An operation is seen where autograd runs it too, since a CPU's
    backward runs in the thread that asks for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[str, str], Count] = {}
        self.times = 1  # that each call counts

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count, and go on."""
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
        count = self.counts.setdefault(
            (name_of(group), NAMES.get(name, name.strip("_"))), Count(group.size())
        )
        count.calls += self.times
        count.size += self.times * size


def name_of(group: dist.ProcessGroup) -> str:
    """Name of a group by its ranks' role; groups with the same ranks are told apart."""
    from megatron.core import parallel_state

    named = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "replicas": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "optimizer": parallel_state.get_intra_distributed_optimizer_instance_group(),
        "world": dist.group.WORLD,
    }
    return next((name for name, other in named.items() if other == group), "other")
