"""The one scorer of held-out text: for an evaluation of all of it, and for validation while
training goes on.

An evaluation reads each source's held-out split up to a limit and compares with the best unigram
model of the same tokens. Validation takes the first tokens of it, the same ones every time, shared
by data-parallel ranks.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from core.errors import InputError
from data.config import DataConfig
from data.stream.loader import find_doc_starts
from data.stream.manifests import Manifest, source_folder, tokenizer_path
from data.stream.shards import Shards
from data.tokenizer import byte_lengths
from data.tokenizer import load as load_tokenizer
from eval.config import ValidationConfig
from model.mamba import FalconMamba


@torch.no_grad()
def sum_of_losses(
    model: FalconMamba, batches: Iterable[tuple[Tensor, int]], reset_state: bool, bf16: bool = False
) -> Tensor:
    """Nats of all predicted tokens, fp64 on the model's device.

    Batches are rows [b, l + 1] of ids, of which the first few count; documents are kept apart as in
    training.
    """
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for rows, counted in batches:
        rows = rows.to(device)
        tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        doc_starts = find_doc_starts(tokens) if reset_state else None
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            losses, _ = model(tokens, targets, doc_starts)
        nats += losses[:counted].double().sum()
    return nats


@dataclass
class Score:
    """Held-out result of one source."""

    tokens: int
    bytes: int
    loss: float  # nats per token
    bits_per_byte: float
    # of the token frequencies of this very text: no unigram model does better on it
    unigram_bits_per_byte: float


def evaluate(
    model: FalconMamba,
    config: DataConfig,
    manifests: dict[str, Manifest],
    seq_len: int,
    batch: int,
    max_tokens: int,
) -> Iterator[tuple[str, Score]]:
    """Score every source's held-out split, yielding one by one.

    Reads at most max_tokens of each, in windows of seq_len whose tokens are all predicted but the
    very first, `batch` windows at once.
    """
    lengths = torch.from_numpy(
        byte_lengths(load_tokenizer(tokenizer_path(config), config.tokenizer.sha256))
    )
    for name, manifest in manifests.items():
        shards = Shards(source_folder(config, name), manifest, "heldout")
        count = min(max_tokens, shards.tokens - 1)
        if count < 1:
            continue
        ids = torch.from_numpy(shards.read(0, count + 1))
        batches = ((rows, len(rows)) for rows in _windows(ids, seq_len, batch))
        nats = float(sum_of_losses(model, batches, config.reset_state))
        size = int(lengths[ids[1:]].sum())
        yield (
            name,
            Score(
                count, size, nats / count, nats / math.log(2) / size, unigram_bits(ids[1:]) / size
            ),
        )


def _windows(ids: Tensor, seq_len: int, batch: int) -> Iterator[Tensor]:
    """Rows [b, l + 1] that cover ids; neighbours share one token, the tail is its own row."""
    whole = (len(ids) - 1) // seq_len
    rows = ids.unfold(0, seq_len + 1, seq_len) if whole else ids.new_empty(0, 1)
    for start in range(0, whole, batch):
        yield rows[start : start + batch]
    if len(ids) - 1 > whole * seq_len:
        yield ids[whole * seq_len :].unsqueeze(0)


def unigram_bits(ids: Tensor) -> float:
    """Bits that ids [t] take under their own token frequencies."""
    counts = np.bincount(ids.numpy()).astype(np.float64)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


class Validation:
    """Loss and bits per byte of each source's first held-out tokens, over data-parallel ranks."""

    def __init__(
        self,
        config: DataConfig,
        manifests: dict[str, Manifest],
        settings: ValidationConfig,
        *,
        bf16: bool = False,
        rank: int = 0,
        ranks: int = 1,
        group: Any = None,
    ) -> None:
        """`rank` of `ranks` in the data-parallel `group` takes every ranks-th row; bf16 as in
        training.

        Raises InputError when held-out files are trained on.
        """
        files_apart(manifests)
        self.config, self.manifests, self.settings, self.bf16 = config, manifests, settings, bf16
        self.rank, self.ranks, self.group = rank, ranks, group
        self.rows: dict[str, Tensor] = {}
        # of them; one more may fill up, for all ranks run equally many forwards
        self.counted: dict[str, int] = {}
        self.sizes: dict[str, tuple[int, int]] = {}  # tokens and bytes that are predicted

    def _read(self) -> None:
        """This rank's rows, at the first validation: a start costs nothing."""
        config, length = self.config, self.settings.seq_len
        lengths = byte_lengths(load_tokenizer(tokenizer_path(config), config.tokenizer.sha256))
        for name, manifest in self.manifests.items():
            ids = fixed_tokens(config, name, manifest, self.settings)
            if len(ids) <= length:
                continue
            windows = torch.from_numpy(ids).unfold(0, length + 1, length)
            numbers = torch.arange(self.rank, len(windows), self.ranks)
            self.counted[name] = len(numbers)
            rows = -(-len(windows) // self.ranks)
            self.rows[name] = windows[F.pad(numbers, (0, rows - len(numbers)))]
            count = len(windows) * length
            self.sizes[name] = (count, int(lengths[ids[1 : count + 1]].sum()))

    def after(
        self, before: int, now: int, model: FalconMamba
    ) -> dict[str, dict[str, float]] | None:
        """Results if (before, now] has a multiple of every_tokens, else None; call on all ranks."""
        every = self.settings.every_tokens
        return self.run(model) if now // every > before // every else None

    def run(self, model: FalconMamba) -> dict[str, dict[str, float]]:
        """Nats per token and bits per byte of each source."""
        if not self.rows:
            self._read()
        nats = torch.zeros(
            len(self.rows), dtype=torch.float64, device=next(model.parameters()).device
        )
        for place, name in enumerate(self.rows):
            nats[place] = sum_of_losses(
                model, self._batches(name), self.config.reset_state, self.bf16
            )
        if dist.is_initialized():
            dist.all_reduce(nats, group=self.group)
        return {
            name: {"loss": total / tokens, "bits_per_byte": total / math.log(2) / size}
            for (name, (tokens, size)), total in zip(self.sizes.items(), nats.tolist(), strict=True)
        }

    def _batches(self, name: str) -> Iterator[tuple[Tensor, int]]:
        rows, batch = self.rows[name], self.settings.batch_sequences
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch], max(0, self.counted[name] - start)


def fixed_tokens(
    config: DataConfig, name: str, manifest: Manifest, settings: ValidationConfig
) -> np.ndarray:
    """The first held-out tokens of a source, and one more to predict."""
    shards = Shards(source_folder(config, name), manifest, "heldout")
    return shards.read(0, min(settings.tokens + 1, shards.tokens))


def files_apart(manifests: dict[str, Manifest]) -> None:
    """Raise InputError when a held-out file is a training file of any source, by SHA-256."""
    trained = {
        file.sha256: name
        for name, m in manifests.items()
        for file in m.splits["train"]
        if file.tokens
    }
    for name, manifest in manifests.items():
        for file in manifest.splits["heldout"]:
            if file.tokens and file.sha256 in trained:
                owner = trained[file.sha256]
                raise InputError(
                    f"{name}: held-out {file.name} is a training file of {owner}: prepare the "
                    "data again"
                )
