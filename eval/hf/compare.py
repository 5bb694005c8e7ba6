"""Compare transformers' logits of an exported folder with ours, with whole models or by layers.

Both compute in fp32 on the CPU. Our weights are rounded to the exported dtypes first.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from eval.hf.transformers_model import load_transformers_model
from model.checkpoint import CheckpointReader
from model.config import Backend, ModelConfig
from model.hf import TENSORS_OF_LAYER, HfFolder
from model.hf_writer import CHUNK, Entry
from model.kernels import load as load_kernels
from model.mamba import Block, FalconMamba, RMSNorm


def random_tokens(vocab_size: int) -> Tensor:
    """Tokens [2, 48] from a fixed seed."""
    return torch.randint(0, vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare(folder: Path, model: FalconMamba, entries: Iterable[Entry]) -> float:
    """Max difference of logits relative to the largest logit; both models are in memory.

    Rounds the parameters of `model` in place to the dtypes of `entries`.
    """
    hf_model = load_transformers_model(folder)
    parameters = dict(model.named_parameters())
    for entry in entries:
        parameters[entry.name].copy_(parameters[entry.name].to(entry.dtype))
    tokens = random_tokens(model.config.vocab_size)
    logits = model.logits(tokens)
    hf_logits = hf_model(tokens, use_cache=False).logits
    return _relative(_max_abs(logits - hf_logits), _max_abs(hf_logits))


@torch.no_grad()
def compare_by_layer(
    folder: Path, reader: CheckpointReader, config: ModelConfig, entries: Iterable[Entry]
) -> float:
    """Compare as `compare` does with one layer of each model, or a chunk of the head, in memory."""
    from transformers import FalconMambaConfig
    from transformers.models.falcon_mamba.modeling_falcon_mamba import (
        FalconMambaBlock,
        FalconMambaRMSNorm,
    )

    exported = HfFolder(folder)
    dtypes = {entry.name: entry.dtype for entry in entries}
    hf_config = FalconMambaConfig.from_pretrained(folder)
    tokens = random_tokens(config.vocab_size)
    rows = [(int(token), int(token) + 1) for token in tokens.flatten()]
    embedded = [_read_rounded(reader, dtypes, "embedding.weight", *row) for row in rows]
    hf_embedded = [exported.read_rows("embedding.weight", *row) for row in rows]
    h = torch.cat(embedded).view(*tokens.shape, -1)
    hf_h = torch.cat(hf_embedded).view(*tokens.shape, -1)
    kernels = load_kernels(Backend.auto, "cpu")
    for index in range(config.n_layer):
        block = Block(config, kernels)
        hf_block = FalconMambaBlock(hf_config, index).eval()
        for name, hf_name in TENSORS_OF_LAYER.items():
            full_name = f"layers.{index}.{name}"
            weight = reader.read_full("param", full_name).to(dtypes[full_name]).float()
            block.get_parameter(name).copy_(weight)
            hf_parameter = hf_block.get_parameter(hf_name)
            hf_parameter.copy_(exported.read_full(full_name).view_as(hf_parameter))
        h = block(h, None)
        hf_h = hf_block(hf_h)
    norm = RMSNorm(config.d_model, config.norm_eps, kernels)
    hf_norm = FalconMambaRMSNorm(config.d_model, config.norm_eps)
    norm.weight.copy_(_read_rounded(reader, dtypes, "final_norm.weight", 0, config.d_model))
    hf_norm.weight.copy_(exported.read_full("final_norm.weight"))
    h = norm(h)
    hf_h = hf_norm(hf_h)
    max_difference = max_logit = 0.0
    chunk_rows = max(1, CHUNK // config.d_model)
    for start in range(0, config.vocab_size, chunk_rows):
        stop = min(start + chunk_rows, config.vocab_size)
        logits = h @ _read_rounded(reader, dtypes, "lm_head.weight", start, stop).T
        hf_logits = hf_h @ exported.read_rows("lm_head.weight", start, stop).T
        max_difference = max(max_difference, _max_abs(logits - hf_logits))
        max_logit = max(max_logit, _max_abs(hf_logits))
    return _relative(max_difference, max_logit)


def _max_abs(x: Tensor) -> float:
    """Largest magnitude; infinite if x contains NaN, because max() of floats would skip it."""
    return float(x.abs().nan_to_num(nan=torch.inf).max())


def _read_rounded(
    reader: CheckpointReader, dtypes: dict[str, torch.dtype], name: str, start: int, stop: int
) -> Tensor:
    """Read rows of our tensor, rounded to its exported dtype."""
    return reader.read_rows("param", name, start, stop).to(dtypes[name]).float()


def _relative(difference: float, size: float) -> float:
    """Difference over size; logits that are all 0 differ by nothing, or infinitely."""
    return difference / size if size else (math.inf if difference else 0.0)
