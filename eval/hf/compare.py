"""Logits of an exported folder in transformers against ours: whole models, or layer by layer where
they do not fit.

Both compute in fp32 on the CPU, ours from weights rounded to the exported types, as the folder's
were.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from eval.hf.transformers_model import load_transformers_model
from model.checkpoint import CheckpointReader
from model.config import Backend, ModelConfig
from model.hf import TENSORS_OF_LAYER, HfFolder
from model.hf_writer import CHUNK, Entry
from model.kernels import load as kernels_of
from model.mamba import Block, FalconMamba, RMSNorm


def probe(vocab_size: int) -> Tensor:
    """Tokens [2, 48] to compare on."""
    return torch.randint(0, vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare(folder: Path, model: FalconMamba, written: Iterable[Entry]) -> float:
    """Largest difference of logits, relative to the largest logit; both models are in memory."""
    hf_model = load_transformers_model(folder)
    parameters = dict(model.named_parameters())
    for entry in written:
        parameters[entry.name].copy_(parameters[entry.name].to(entry.dtype))
    tokens = probe(model.config.vocab_size)
    ours, theirs = model.logits(tokens), hf_model(tokens, use_cache=False).logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def compare_by_layer(
    folder: Path, reader: CheckpointReader, shape: ModelConfig, written: Iterable[Entry]
) -> float:
    """As compare; memory holds one layer of each model, or a piece of the head."""
    from transformers import FalconMambaConfig
    from transformers.models.falcon_mamba.modeling_falcon_mamba import (
        FalconMambaBlock,
        FalconMambaRMSNorm,
    )

    source, dtypes = HfFolder(folder), {entry.name: entry.dtype for entry in written}
    config = FalconMambaConfig.from_pretrained(folder)
    tokens = probe(shape.vocab_size)
    mine = torch.cat(
        [_ours(reader, dtypes, "embedding.weight", int(t), int(t) + 1) for t in tokens.flatten()]
    )
    theirs = torch.cat(
        [source.read_rows("embedding.weight", int(t), int(t) + 1) for t in tokens.flatten()]
    )
    h, g = (rows.view(*tokens.shape, -1) for rows in (mine, theirs))
    kernels = kernels_of(Backend.auto, "cpu")
    for index in range(shape.n_layer):
        block, hf_model = Block(shape, kernels), FalconMambaBlock(config, index).eval()
        for ours, name in TENSORS_OF_LAYER.items():
            full = f"layers.{index}.{ours}"
            block.get_parameter(ours).copy_(
                reader.read_full("param", full).to(dtypes[full]).float()
            )
            hf_model.get_parameter(name).copy_(
                source.read_full(full).view_as(hf_model.get_parameter(name))
            )
        h, g = block(h, None), hf_model(g)
    norm = RMSNorm(shape.d_model, shape.norm_eps, kernels)
    their_norm = FalconMambaRMSNorm(shape.d_model, shape.norm_eps)
    norm.weight.copy_(_ours(reader, dtypes, "final_norm.weight", 0, shape.d_model))
    their_norm.weight.copy_(source.read_full("final_norm.weight"))
    h, g = norm(h), their_norm(g)
    difference = largest = 0.0
    step = max(1, CHUNK // shape.d_model)
    for low in range(0, shape.vocab_size, step):
        high = min(low + step, shape.vocab_size)
        a, b = (
            h @ _ours(reader, dtypes, "lm_head.weight", low, high).T,
            g @ source.read_rows("lm_head.weight", low, high).T,
        )
        difference = max(difference, _largest(a - b))
        largest = max(largest, _largest(b))
    return difference / largest


def _largest(x: Tensor) -> float:
    """Largest magnitude; infinite when any is not a number, so that it cannot be passed over."""
    return float(x.abs().nan_to_num(nan=torch.inf).max())


def _ours(
    reader: CheckpointReader, dtypes: dict[str, torch.dtype], name: str, start: int, stop: int
) -> Tensor:
    """Rows of our tensor, rounded to its exported type."""
    return reader.read_rows("param", name, start, stop).to(dtypes[name]).float()
