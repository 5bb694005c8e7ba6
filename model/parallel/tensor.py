"""megatron-core's tensor-parallel layers with torch's call signature.

Only this module and model/parallel/sequence.py import megatron-core within model/. The layers are
uninitialised; model/init.py sets the values. All-reduces per block: after x_proj and out_proj in
the forward; of the gradients of x_proj's output and in_proj's input in the backward.
"""

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F


def _config() -> ModelParallelConfig:
    # use_cpu_initialization allocates on the current default device (meta) instead of CUDA; fused
    # gradient accumulation would need Apex
    return ModelParallelConfig(
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


class ColumnParallel(tensor_parallel.ColumnParallelLinear):
    """Linear with sharded output features; each rank returns its shard."""

    def __init__(self, inputs: int, outputs: int, sum_input_gradient: bool = True) -> None:
        super().__init__(
            inputs,
            outputs,
            config=_config(),
            init_method=nn.init.zeros_,
            bias=False,
            disable_grad_reduce=not sum_input_gradient,
        )
        self.sum_input_gradient = sum_input_gradient

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs], the same on every rank -> [..., outputs / size]."""
        if x.is_cuda:  # megatron-core overlaps the all-reduce of x's gradient with the weight's
            return super().forward(x)[0]
        # megatron-core's function supports autocast on CUDA only
        return F.linear(
            copy_to_tensor_model_parallel_region(x) if self.sum_input_gradient else x, self.weight
        )


class RowParallel(tensor_parallel.RowParallelLinear):
    """Linear with sharded input features; partial outputs are all-reduced."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            inputs,
            outputs,
            config=_config(),
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs / size] -> [..., outputs], the same on every rank."""
        if x.is_cuda:
            return super().forward(x)[0]
        return reduce_from_tensor_model_parallel_region(F.linear(x, self.weight))


class AllReduceRowParallel(RowParallel):
    """RowParallel whose output gradient is all-reduced too.

    For Mamba-1's x_proj: dt, B and C depend on all channels and act on all channels, so each rank
    has only a partial gradient of them. Without the all-reduce in the backward the loss is equal
    and the gradients are silently wrong.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs / size] -> [..., outputs], the same on every rank."""
        return copy_to_tensor_model_parallel_region(super().forward(x))


class VocabParallelEmbedding(tensor_parallel.VocabParallelEmbedding):
    """Embedding with sharded rows; lookups are all-reduced."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, init_method=nn.init.zeros_, config=_config())


class VocabularyRanks:
    """Tensor-parallel ranks for the loss (a model.kernels.cross_entropy.VocabParallelGroup)."""

    def vocab_start_index(self, local_size: int) -> int:
        """Token id of the first row of this rank's shard of `local_size` rows."""
        return parallel_state.get_tensor_model_parallel_rank() * local_size

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM)

    @staticmethod
    def _reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, op, group=parallel_state.get_tensor_model_parallel_group())
        return x
