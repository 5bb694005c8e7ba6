"""megatron-core's parallel layers with the call signature of torch's, for model/parallel.py to put in place.

The only module of the model that knows megatron-core. Layers are built without initial values (model/init.py owns
those). Collectives per block: forward x_proj and out_proj sum, backward x_proj's output and in_proj's input sum.
"""

import torch
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import LOSS_CHUNK
from model.kernels.reference import computing_type


def _config() -> ModelParallelConfig:
    # use_cpu_initialization makes the layers allocate on the current default device (meta) and not on CUDA;
    # fused gradient accumulation needs apex
    return ModelParallelConfig(
        use_cpu_initialization=True, perform_initialization=False, gradient_accumulation_fusion=False
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

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs], the same on every rank -> [..., outputs / size]."""
        return super().forward(x)[0]


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
        return super().forward(x)[0]


class SummedRowParallel(RowParallel):
    """RowParallel whose output feeds split computation: its gradient is partial on every rank and is summed too.

    Mamba-1's x_proj: dt, B and C come from all channels and act on all channels. Without the backward sum the loss
    is equal and the gradient is silently wrong.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs / size] -> [..., outputs], the same on every rank."""
        return copy_to_tensor_model_parallel_region(super().forward(x))


class VocabParallel(tensor_parallel.VocabParallelEmbedding):
    """Embedding whose rows are split; the lookups are summed over ranks."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, init_method=nn.init.zeros_, config=_config())


def linear_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    """model.kernels.cross_entropy.linear_cross_entropy over a head whose rows are split: hidden [t, e], labels [t]."""
    chunks = [
        checkpoint(_cross_entropy, head, states, targets, use_reentrant=False)
        for states, targets in zip(hidden.split(LOSS_CHUNK), labels.split(LOSS_CHUNK), strict=True)
    ]
    losses, log_sums = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return losses, log_sums


def _cross_entropy(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logits = logits.to(computing_type(logits))
    loss = tensor_parallel.vocab_parallel_cross_entropy(logits.clone(), labels)  # changes its input
    local = labels - parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    here = (local >= 0) & (local < logits.shape[-1])
    own = logits.gather(-1, local.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1) * here
    return loss, loss + reduce_from_tensor_model_parallel_region(own)
