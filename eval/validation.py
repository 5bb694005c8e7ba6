"""Validation during training: fixed held-out tokens, the same ones every time, and proof that they are held out.

Every rank keeps its share of the tokens in memory (8 bytes each) and does forward passes only. As a script it reads
every training shard once and fails when it finds one of these documents.

examples:
  python eval/validation.py +experiment=demo
"""

import hashlib
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from core.command import command
from core.errors import InputError
from data.config import DataConfig
from data.stream.loader import document_starts
from data.stream.manifests import DTYPE, Manifest, open_manifests, source_folder, tokenizer_path
from data.stream.shards import Shards
from data.tokenizer import EOS, byte_lengths
from data.tokenizer import load as load_tokenizer
from eval.config import EvaluationConfig, ValidationConfig
from model.mamba import FalconMamba

logger = logging.getLogger(__name__)

READ_TOKENS = 1 << 24  # of a training shard at once


class Validation:
    """Loss and bits per byte of every source on its first held-out tokens, over data-parallel ranks."""

    def __init__(
        self,
        config: DataConfig,
        settings: ValidationConfig,
        *,
        bf16: bool = False,
        rank: int = 0,
        ranks: int = 1,
        group: Any = None,
    ) -> None:
        """`rank` of `ranks` in the data-parallel `group` takes every ranks-th row; bf16 as in training.

        Raises InputError when held-out files are trained on.
        """
        files_apart(open_manifests(config))
        self.config, self.settings, self.bf16 = config, settings, bf16
        self.rank, self.ranks, self.group = rank, ranks, group
        self.rows: dict[str, Tensor] = {}
        self.counted: dict[str, int] = {}  # of them; one more may fill up, for all ranks run equally many forwards
        self.sizes: dict[str, tuple[int, int]] = {}  # tokens and bytes that are predicted

    def _read(self) -> None:
        """This rank's rows, at the first validation: a start costs nothing."""
        config, length = self.config, self.settings.seq_len
        lengths = byte_lengths(load_tokenizer(tokenizer_path(config), config.tokenizer.sha256))
        for name, manifest in open_manifests(config).items():
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

    def after(self, before: int, now: int, model: FalconMamba) -> dict[str, dict[str, float]] | None:
        """Results when a multiple of every_tokens lies in (before, now], else None. Every rank takes part."""
        every = self.settings.every_tokens
        return self.run(model) if now // every > before // every else None

    @torch.no_grad()
    def run(self, model: FalconMamba) -> dict[str, dict[str, float]]:
        """Nats per token and bits per byte of each source."""
        if not self.rows:
            self._read()
        device = next(model.parameters()).device
        nats = torch.zeros(len(self.rows), dtype=torch.float64, device=device)
        for index, (name, rows) in enumerate(self.rows.items()):
            for start in range(0, len(rows), self.settings.batch):
                batch = rows[start : start + self.settings.batch].to(device)
                tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
                starts = document_starts(tokens) if self.config.reset_state else None
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
                    losses, _ = model(tokens, targets, starts)
                nats[index] += losses[: max(0, self.counted[name] - start)].double().sum()
        if dist.is_initialized():
            dist.all_reduce(nats, group=self.group)
        return {
            name: {"loss": total / tokens, "bits_per_byte": total / math.log(2) / size}
            for (name, (tokens, size)), total in zip(self.sizes.items(), nats.tolist(), strict=True)
        }


def fixed_tokens(config: DataConfig, name: str, manifest: Manifest, settings: ValidationConfig) -> np.ndarray:
    """The first held-out tokens of a source, and one more to predict."""
    shards = Shards(source_folder(config, name), manifest, "heldout")
    return shards.read(0, min(settings.tokens + 1, shards.tokens))


def files_apart(manifests: dict[str, Manifest]) -> None:
    """Raise InputError when a held-out file is a training file of any source, by SHA-256."""
    trained = {file.sha256: name for name, m in manifests.items() for file in m.splits["train"] if file.tokens}
    for name, manifest in manifests.items():
        for file in manifest.splits["heldout"]:
            if file.tokens and file.sha256 in trained:
                owner = trained[file.sha256]
                raise InputError(f"{name}: held-out {file.name} is a training file of {owner}: prepare the data again")


def documents(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length and token sum of every document that ids [t] hold whole, its end-of-text included."""
    ends = np.flatnonzero(ids == EOS) + 1
    if not len(ends):
        return ends, ends, ends
    starts = np.concatenate([[0], ends[:-1]])
    return starts, ends - starts, np.add.reduceat(ids, starts)


def digest(ids: np.ndarray) -> bytes:
    """SHA-256 of a document's tokens as they lie in a shard."""
    return hashlib.sha256(ids.astype(DTYPE).tobytes()).digest()


def trained_documents(config: DataConfig, settings: ValidationConfig) -> Iterator[tuple[str, str, int]]:
    """Held-out documents of validation that a training shard holds too: (source, trained in, times)."""
    manifests = open_manifests(config)
    held: dict[tuple[int, int], dict[bytes, str]] = defaultdict(dict)  # length and sum first: few need a hash
    for name, manifest in manifests.items():
        ids = fixed_tokens(config, name, manifest, settings)
        for start, length, total in zip(*documents(ids), strict=True):
            held[int(length), int(total)][digest(ids[start : start + length])] = name
    keys = np.array(sorted(length << 32 | total for length, total in held), dtype=np.int64)
    for name, manifest in manifests.items():
        found: dict[str, int] = defaultdict(int)
        for ids in _training_pieces(config, name, manifest):
            starts, lengths, totals = documents(ids)
            for place in np.flatnonzero(np.isin(lengths << 32 | totals, keys)):
                start, length = int(starts[place]), int(lengths[place])
                owner = held[length, int(totals[place])].get(digest(ids[start : start + length]))
                if owner is not None:
                    found[owner] += 1
        yield from ((owner, name, times) for owner, times in found.items())


def _training_pieces(config: DataConfig, name: str, manifest: Manifest) -> Iterator[np.ndarray]:
    """A source's training tokens in pieces that begin with a document."""
    shards = Shards(source_folder(config, name), manifest, "train")
    start = 0
    while start < shards.tokens:
        ids = shards.read(start, min(READ_TOKENS, shards.tokens - start))
        yield ids
        ends = np.flatnonzero(ids == EOS)
        start += int(ends[-1]) + 1 if len(ends) else len(ids)


def prove(config: EvaluationConfig) -> None:
    """Read every training shard once, and name what validation and training share."""
    files_apart(open_manifests(config.data))
    shared = list(trained_documents(config.data, config.eval.validation))
    if shared:
        lines = "; ".join(f"{times} of {owner} in {name}" for owner, name, times in shared)
        raise InputError(f"held-out documents are in the training shards: {lines}. Deduplicate across splits")
    logger.info("no document of validation is in a training shard")


main = command(EvaluationConfig)(prove)

if __name__ == "__main__":
    main()
