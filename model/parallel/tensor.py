"""megatron-core's parallel layers with the call signature of torch's, for model/parallel/build.py
to put in place.

Of the model only this module and model/parallel/sequence.py import megatron-core. Layers are built
without initial values (model/init.py owns those). Collectives per block: forward x_proj and
out_proj sum, backward x_proj's output and in_proj's input sum.
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
    # use_cpu_initialization makes the layers allocate on the current default device (meta) and not
    # on CUDA; fused gradient accumulation needs apex
    return ModelParallelConfig(
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


class ColumnParallel(tensor_parallel.ColumnParallelLinear):
    """Linear whose output features are split; each rank returns its own."""

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
        if x.is_cuda:  # megatron-core's function sums x's gradient while it computes the weight's
            return super().forward(x)[0]
        # it takes autocast on CUDA alone
        return F.linear(
            copy_to_tensor_model_parallel_region(x) if self.sum_input_gradient else x, self.weight
        )


class RowParallel(tensor_parallel.RowParallelLinear):
    """Linear whose input features are split; the partial outputs are summed over ranks."""

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


class SummedRowParallel(RowParallel):
    """RowParallel whose output feeds split computation: its gradient is partial on every rank and
    is summed too.

    Mamba-1's x_proj: dt, B and C come from all channels and act on all channels. Without the
    backward sum the loss is equal and the gradient is silently wrong.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs / size] -> [..., outputs], the same on every rank."""
        return copy_to_tensor_model_parallel_region(super().forward(x))


class VocabParallel(tensor_parallel.VocabParallelEmbedding):
    """Embedding whose rows are split; the lookups are summed over ranks."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, init_method=nn.init.zeros_, config=_config())


class VocabularyRanks:
    """Tensor-parallel ranks for the loss (a model.kernels.cross_entropy.VocabularyGroup)."""

    def offset(self, rows: int) -> int:
        """Id of the first token of this rank's rows."""
        return parallel_state.get_tensor_model_parallel_rank() * rows

    def maximum(self, x: Tensor) -> Tensor:
        """Elementwise over ranks."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise over ranks."""
        return self._reduce(x, dist.ReduceOp.SUM)

    @staticmethod
    def _reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, op, group=parallel_state.get_tensor_model_parallel_group())
        return x
