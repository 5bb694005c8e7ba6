"""Bits per byte on held-out text, per source, against the best unigram model of the same tokens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.stream.loader import document_starts
from data.stream.manifests import open_manifests, source_folder, tokenizer_path
from data.stream.shards import Shards
from data.tokenizer import byte_lengths
from data.tokenizer import load as load_tokenizer
from model.mamba import FalconMamba


@dataclass
class Score:
    """Held-out result of one source."""

    tokens: int
    bytes: int
    loss: float  # nats per token
    bits_per_byte: float
    unigram_bits_per_byte: float  # of the token frequencies of this very text: no unigram model does better on it


@torch.no_grad()
def evaluate(
    model: FalconMamba, config: DataConfig, seq_len: int, batch: int, max_tokens: int
) -> Iterator[tuple[str, Score]]:
    """Score every source's held-out split, yielding one by one.

    Reads at most max_tokens of each, in windows of seq_len whose tokens are all predicted but the very first, `batch`
    windows at once; documents are kept apart as in training.
    """
    manifests = open_manifests(config)
    lengths = torch.from_numpy(byte_lengths(load_tokenizer(tokenizer_path(config), config.tokenizer.sha256)))
    device = next(model.parameters()).device
    for name, manifest in manifests.items():
        shards = Shards(source_folder(config, name), manifest, "heldout")
        count = min(max_tokens, shards.tokens - 1)
        if count < 1:
            continue
        ids = torch.from_numpy(shards.read(0, count + 1))
        nats = sum(_window_nats(model, config, rows.to(device)) for rows in _windows(ids, seq_len, batch))
        size = int(lengths[ids[1:]].sum())
        bits = nats / math.log(2)
        yield name, Score(count, size, nats / count, bits / size, unigram_bits(ids[1:]) / size)


def _windows(ids: Tensor, seq_len: int, batch: int) -> Iterator[Tensor]:
    """Rows [b, l + 1] that cover ids, neighbours sharing one token; the tail comes as a row of its own."""
    whole = (len(ids) - 1) // seq_len
    rows = ids.unfold(0, seq_len + 1, seq_len) if whole else ids.new_empty(0, 1)
    for start in range(0, whole, batch):
        yield rows[start : start + batch]
    if len(ids) - 1 > whole * seq_len:
        yield ids[whole * seq_len :].unsqueeze(0)


def _window_nats(model: FalconMamba, config: DataConfig, rows: Tensor) -> float:
    tokens, targets = rows[:, :-1], rows[:, 1:]
    starts = document_starts(tokens) if config.reset_state else None
    losses, _ = model(tokens, targets, starts)
    return float(losses.double().sum())


def unigram_bits(ids: Tensor) -> float:
    """Bits that ids [t] take under their own token frequencies."""
    counts = np.bincount(ids.numpy()).astype(np.float64)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())
