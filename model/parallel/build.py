"""The one function that builds a rank's model."""

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
    """A rank's model in fp32: empty on meta, cut, allocated, filled, marked, in this order.

    With tp_size > 1 megatron-core's process groups must be initialised. Costs one full parameter of
    host memory.
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
    """A rank's model on the meta device: cut, and with nothing allocated."""
    config.check_tensor_parallel(tp_size)
    with torch.device("meta"):
        model = FalconMamba(config, kernels)
        if tp_size > 1:
            _put_parallel_layers(model, config, tp_size)
            if sequence_parallel:
                _put_sequence_parallel_layers(model, config)
    model.set_recompute(recompute)
    return model


def set_tp_attributes(model: FalconMamba, tp_size: int) -> None:
    """Say of every parameter whether tensor-parallel ranks hold different parts of it.

    DeepSpeed counts a parameter without this mark on tensor-parallel rank 0 only when it takes the
    gradient norm.
    """
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = shard_spec(name) is not None and tp_size > 1  # type: ignore[attr-defined]


def _put_parallel_layers(model: FalconMamba, config: ModelConfig, size: int) -> None:
    """Replace cut parameters: linears and embedding by megatron-core's, others by smaller ones."""
    # imported here: megatron-core takes seconds to import and one rank needs none of it
    from model.parallel.tensor import (
        ColumnParallel,
        RowParallel,
        SummedRowParallel,
        VocabParallel,
        VocabularyRanks,
    )

    c = config
    model.embedding = VocabParallel(c.vocab_size, c.d_model)
    for layer in model.layers:
        mixer: Any = layer.mixer
        mixer.in_proj = ColumnParallel(c.d_model, 2 * c.d_inner)
        mixer.x_proj = SummedRowParallel(c.d_inner, c.dt_rank + 2 * c.d_state)
        # its input's gradient is summed over ranks by x_proj's output, together with those of B and
        # C
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


def _put_sequence_parallel_layers(model: FalconMamba, config: ModelConfig) -> None:
    """Replace what touches the residual stream by what holds this rank's tokens of it alone."""
    from model.parallel.sequence import (
        GatheredColumnParallel,
        JoinedNorm,
        ScatteredRowParallel,
        SequenceNorm,
        SplitVocabParallel,
    )

    c = config
    model.embedding = SplitVocabParallel(c.vocab_size, c.d_model)
    for layer in model.layers:
        block: Any = layer
        block.norm = SequenceNorm(c.d_model, c.norm_eps, model.kernels)
        block.mixer.in_proj = GatheredColumnParallel(c.d_model, 2 * c.d_inner)
        block.mixer.out_proj = ScatteredRowParallel(c.d_inner, c.d_model)
    model.final_norm = JoinedNorm(c.d_model, c.norm_eps, model.kernels)
