"""Build a rank's model: meta device, sharded layers, allocation, initial values, TP attributes."""

from typing import Any

import torch
from torch import nn

from model.config import ModelConfig, Recompute
from model.init import initialize
from model.kernels import Kernels
from model.mamba import FalconMamba
from model.parameters import shard_spec
from model.sharding import shard


def build_model(
    config: ModelConfig,
    kernels: Kernels,
    seed: int,
    device: torch.device,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = Recompute.none,
) -> FalconMamba:
    """Build and initialise a rank's model in fp32.

    With tp_size > 1, megatron-core's process groups must be initialised. Peak host memory exceeds
    the rank's shard by one full parameter.
    """
    model = build_meta_model(config, kernels, tp_size, sequence_parallel, recompute)
    model.to_empty(device=device)
    initialize(model, config, seed, lambda name, full: shard(name, full, tp_rank, tp_size))
    set_tp_attributes(model, tp_size)
    return model


def build_meta_model(
    config: ModelConfig,
    kernels: Kernels,
    tp_size: int,
    sequence_parallel: bool,
    recompute: Recompute,
) -> FalconMamba:
    """Build a rank's model with sharded layers on the meta device; nothing is allocated."""
    config.check_tensor_parallel(tp_size)
    with torch.device("meta"):
        model = FalconMamba(config, kernels)
        if tp_size > 1:
            _replace_with_tensor_parallel_layers(model, config, tp_size)
            if sequence_parallel:
                _replace_with_sequence_parallel_layers(model, config)
    model.set_recompute(recompute)
    return model


def set_tp_attributes(model: FalconMamba, tp_size: int) -> None:
    """Set `tensor_model_parallel` on every parameter: True if it is sharded over TP ranks.

    In the gradient norm DeepSpeed counts parameters without it on tensor-parallel rank 0 only.
    """
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = shard_spec(name) is not None and tp_size > 1  # type: ignore[attr-defined]


def _replace_with_tensor_parallel_layers(
    model: FalconMamba, config: ModelConfig, size: int
) -> None:
    """Replace linears and embedding by megatron-core's, other sharded parameters by local ones."""
    # imported here: megatron-core takes seconds to import, and a single rank does not need it
    from model.parallel.tensor import (
        AllReduceRowParallel,
        ColumnParallel,
        RowParallel,
        VocabParallelEmbedding,
        VocabularyRanks,
    )

    c = config
    model.embedding = VocabParallelEmbedding(c.vocab_size, c.d_model)
    for layer in model.layers:
        mixer: Any = layer.mixer
        mixer.in_proj = ColumnParallel(c.d_model, 2 * c.d_inner)
        mixer.x_proj = AllReduceRowParallel(c.d_inner, c.dt_rank + 2 * c.d_state)
        # x_proj's output sums the gradient of dt over ranks, together with those of B and C
        mixer.dt_proj = ColumnParallel(c.dt_rank, c.d_inner, sum_input_gradient=False)
        mixer.out_proj = RowParallel(c.d_inner, c.d_model)
        for name, parameter in list(mixer.named_parameters(recurse=False)):
            setattr(
                mixer,
                name,
                nn.Parameter(torch.empty(parameter.shape[0] // size, *parameter.shape[1:])),
            )
    model.lm_head = ColumnParallel(c.d_model, c.vocab_size)
    model.vocabulary_group = VocabularyRanks()


def _replace_with_sequence_parallel_layers(model: FalconMamba, config: ModelConfig) -> None:
    """Replace the layers next to the residual stream: each rank holds only its tokens of it."""
    from model.parallel.sequence import (
        AllGatherColumnParallel,
        GatheredFinalNorm,
        ReduceScatterRowParallel,
        SequenceParallelEmbedding,
        SequenceParallelNorm,
    )

    c = config
    model.embedding = SequenceParallelEmbedding(c.vocab_size, c.d_model)
    for layer in model.layers:
        block: Any = layer
        block.norm = SequenceParallelNorm(c.d_model, c.norm_eps, model.kernels)
        block.mixer.in_proj = AllGatherColumnParallel(c.d_model, 2 * c.d_inner)
        block.mixer.out_proj = ReduceScatterRowParallel(c.d_inner, c.d_model)
    model.final_norm = GatheredFinalNorm(c.d_model, c.norm_eps, model.kernels)
