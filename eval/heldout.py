"""Loss and bits per byte of held-out text, for evaluation and for validation during training.

`evaluate` reads each source's held-out split up to a limit and compares it with the best unigram
model of the same tokens. `Validation` scores the same first tokens each time, split over the
data-parallel ranks.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import TypedDict

from core.errors import InputError
from data.config import DataConfig
from data.stream.loader import find_doc_starts
from data.stream.manifests import Manifest, reset_token, source_folder, tokenizer_path
from data.stream.shards import Shards
from data.tokenizer import load as load_tokenizer
from data.vocabulary import byte_lengths
from eval.config import ValidationConfig
from model.mamba import FalconMamba

logger = logging.getLogger(__name__)


@torch.no_grad()
def sum_loss(
    model: FalconMamba, batches: Iterable[tuple[Tensor, int]], eos: int | None, bf16: bool = False
) -> Tensor:
    """Return the summed loss in nats of all predicted tokens, fp64 on the model's device.

    A batch is token ids [b, l + 1] and how many of its first rows count. The state is reset after
    `eos`, as in training; None never resets it.
    """
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for ids, num_scored in batches:
        ids = ids.to(device)
        tokens = ids[:, :-1].contiguous()
        targets = ids[:, 1:].contiguous()
        doc_starts = None if eos is None else find_doc_starts(tokens, eos)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            losses, _ = model(tokens, targets, doc_starts)
        nats += losses[:num_scored].double().sum()
    return nats


@dataclass
class HeldoutScore:
    """Held-out result of one source."""

    tokens: int
    bytes: int
    loss: float  # nats per token
    bits_per_byte: float
    # entropy of this text's own token frequencies: the lower bound of any unigram model
    unigram_bits_per_byte: float


class HeldoutRecord(TypedDict):
    """Content of eval.json; further keys say what was scored."""

    checkpoint: str
    heldout: dict[str, HeldoutScore]
    sample: str


def evaluate(
    model: FalconMamba,
    config: DataConfig,
    manifests: dict[str, Manifest],
    seq_len: int,
    batch_size: int,
    max_tokens: int,
) -> Iterator[tuple[str, HeldoutScore]]:
    """Yield the score of every source's held-out split.

    Reads at most max_tokens of each source in windows of seq_len, batch_size windows per forward,
    and leaves out sources without held-out text.
    Every token but the first is predicted once.
    """
    tokenizer = load_tokenizer(tokenizer_path(config), config.tokenizer.sha256)
    for name, manifest in manifests.items():
        token_bytes = torch.from_numpy(byte_lengths(tokenizer, manifest.eos))
        shards = Shards(source_folder(config, name), manifest, "heldout")
        count = min(max_tokens, shards.tokens - 1)
        if count < 1:
            continue
        ids = torch.from_numpy(shards.read(0, count + 1))
        num_bytes = int(token_bytes[ids[1:]].sum())
        if num_bytes < 1:  # ends of empty documents: nothing to score
            continue
        batches = ((windows, len(windows)) for windows in _windows(ids, seq_len, batch_size))
        nats = float(sum_loss(model, batches, reset_token(config, manifest)))
        score = HeldoutScore(
            tokens=count,
            bytes=num_bytes,
            loss=nats / count,
            bits_per_byte=nats / math.log(2) / num_bytes,
            unigram_bits_per_byte=unigram_bits(ids[1:]) / num_bytes,
        )
        yield name, score


def _windows(ids: Tensor, seq_len: int, batch_size: int) -> Iterator[Tensor]:
    """Yield batches [b, seq_len + 1] that cover ids; neighbouring windows share one token.

    The last window is shorter and comes in a batch of its own.
    """
    num_full = (len(ids) - 1) // seq_len
    windows = ids.unfold(0, seq_len + 1, seq_len) if num_full else ids.new_empty(0, 1)
    for start in range(0, num_full, batch_size):
        yield windows[start : start + batch_size]
    if len(ids) - 1 > num_full * seq_len:
        yield ids[num_full * seq_len :].unsqueeze(0)


def unigram_bits(ids: Tensor) -> float:
    """Bits of ids [t] under their own token frequencies."""
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
        world_size: int = 1,
        group: Any = None,
    ) -> None:
        """Score every world_size-th window, from `rank` on; `group` is all-reduced.

        `bf16` enables autocast. Raises InputError when a held-out file is also a training file.
        """
        check_split_files(manifests)
        self.config = config
        self.manifests = manifests
        self.settings = settings
        self.bf16 = bf16
        self.rank = rank
        self.world_size = world_size
        self.group = group
        self.windows: dict[str, Tensor] = {}  # this rank's, [n, seq_len + 1] of each source
        # a padding window may follow: every rank runs the same number of forwards
        self.num_scored: dict[str, int] = {}
        self.totals: dict[str, tuple[int, int]] = {}  # predicted tokens and bytes, all ranks

    def _load_windows(self) -> None:
        """Load this rank's windows; deferred to the first validation to keep the start fast."""
        config = self.config
        seq_len = self.settings.seq_len
        tokenizer = load_tokenizer(tokenizer_path(config), config.tokenizer.sha256)
        for name, manifest in self.manifests.items():
            token_bytes = byte_lengths(tokenizer, manifest.eos)
            ids = read_validation_tokens(config, name, manifest, self.settings)
            count = (len(ids) - 1) // seq_len * seq_len
            num_bytes = int(token_bytes[ids[1 : count + 1]].sum())
            if num_bytes < 1:  # less than a window, or ends of empty documents
                logger.warning(
                    f"validation leaves out {name}: its {len(ids):,} held-out tokens are no window "
                    f"of {seq_len:,} and one more: lower validation.seq_len, or raise "
                    "data.heldout_percent and prepare the data again"
                )
                continue
            windows = torch.from_numpy(ids).unfold(0, seq_len + 1, seq_len)
            indices = torch.arange(self.rank, len(windows), self.world_size)
            self.num_scored[name] = len(indices)
            windows_per_rank = -(-len(windows) // self.world_size)
            self.windows[name] = windows[F.pad(indices, (0, windows_per_rank - len(indices)))]
            self.totals[name] = (count, num_bytes)

    def run_if_due(
        self, previous_tokens: int, tokens: int, total: int, model: FalconMamba
    ) -> dict[str, dict[str, float]] | None:
        """Run if (previous_tokens, tokens] has a multiple of every_tokens, or `tokens` is the end.

        Call on all ranks.
        """
        every = self.settings.every_tokens
        is_due = tokens // every > previous_tokens // every or tokens == total
        return self.run(model) if is_due else None

    def run(self, model: FalconMamba) -> dict[str, dict[str, float]]:
        """Return loss (nats per token) and bits per byte of each source; call on all ranks."""
        if not self.windows:
            self._load_windows()
        device = next(model.parameters()).device
        nats = torch.zeros(len(self.windows), dtype=torch.float64, device=device)
        for index, name in enumerate(self.windows):
            eos = reset_token(self.config, self.manifests[name])
            nats[index] = sum_loss(model, self._batches(name), eos, self.bf16)
        if dist.is_initialized():
            dist.all_reduce(nats, group=self.group)
        return {
            name: {"loss": total / tokens, "bits_per_byte": total / math.log(2) / num_bytes}
            for (name, (tokens, num_bytes)), total in zip(
                self.totals.items(), nats.tolist(), strict=True
            )
        }

    def _batches(self, name: str) -> Iterator[tuple[Tensor, int]]:
        windows = self.windows[name]
        batch_size = self.settings.batch_sequences
        for start in range(0, len(windows), batch_size):
            yield windows[start : start + batch_size], max(0, self.num_scored[name] - start)


def read_validation_tokens(
    config: DataConfig, name: str, manifest: Manifest, settings: ValidationConfig
) -> np.ndarray:
    """Read a source's first held-out tokens, and one more to predict."""
    shards = Shards(source_folder(config, name), manifest, "heldout")
    return shards.read(0, min(settings.tokens + 1, shards.tokens))


def check_split_files(manifests: dict[str, Manifest]) -> None:
    """Raise InputError when a held-out file is a training file of any source, by SHA-256."""
    train_source = {
        file.sha256: name
        for name, manifest in manifests.items()
        for file in manifest.splits["train"]
        if file.tokens
    }
    for name, manifest in manifests.items():
        for file in manifest.splits["heldout"]:
            if file.tokens and file.sha256 in train_source:
                raise InputError(
                    f"{name}: held-out {file.name} is also a training file of "
                    f"{train_source[file.sha256]}; prepare the data again"
                )
