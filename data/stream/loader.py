"""Reads batches by position in the token stream; the position is the loader's only state.

A sequence is a slice of a block. Its index in the stage decides its tokens, so the samples do not
depend on the number of ranks, on workers or on the micro-batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.stream.manifests import Manifest, reset_token, source_folder
from data.stream.mixture import Indices, Plan, PlannedStage
from data.stream.shards import Shards


@dataclass
class Batch:
    """A micro-batch of b sequences of l tokens."""

    tokens: Tensor  # [b, l] int64
    targets: Tensor  # [b, l] int64: tokens shifted left by one
    # [b, l] bool, True at the first token of a document; None if documents do not reset the state
    doc_starts: Tensor | None
    source: Tensor  # [b] int64, index into Plan.sources

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device."""
        doc_starts = self.doc_starts
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            None if doc_starts is None else doc_starts.to(device, non_blocking=True),
            self.source.to(device),
        )

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `function` to every tensor [b, l], e.g. to take a chunk of each sequence."""
        doc_starts = None if self.doc_starts is None else function(self.doc_starts)
        return Batch(function(self.tokens), function(self.targets), doc_starts, self.source)


def find_doc_starts(tokens: Tensor, eos: int) -> Tensor:
    """True at the token after eos. tokens [b, l] -> [b, l] bool; column 0 is False."""
    doc_starts = torch.zeros_like(tokens, dtype=torch.bool)
    doc_starts[:, 1:] = tokens[:, :-1] == eos
    return doc_starts


def compile_plan(config: DataConfig, manifests: dict[str, Manifest]) -> Plan:
    """Compile the order of all blocks of the run from its config and its manifests."""
    tokens = {name: manifest.tokens("train") for name, manifest in manifests.items()}
    fingerprints = {
        name: ",".join(file.sha256 for file in manifest.splits["train"])
        for name, manifest in manifests.items()
    }
    return Plan(config, tokens, fingerprints)


class Loader:
    """Reads the sequences of a plan."""

    def __init__(self, plan: Plan, manifests: dict[str, Manifest]) -> None:
        config = plan.config
        self.plan = plan
        # open_manifests checks that all sources have the same
        self.eos = reset_token(config, manifests[plan.sources[0]])
        self.shards = [
            Shards(source_folder(config, name), manifests[name], "train") for name in plan.sources
        ]

    def read(self, stage: PlannedStage, indices: Indices) -> Batch:
        """Read the sequences with these indices in a stage as one micro-batch."""
        seqs_per_block = self.plan.block_tokens // stage.seq_len
        source, block = self.plan.find_blocks(stage, indices // seqs_per_block)
        offset = block * self.plan.block_tokens + indices % seqs_per_block * stage.seq_len
        rows = np.empty((len(indices), stage.seq_len + 1), dtype=np.int64)
        for row, source_index, start in zip(rows, source.tolist(), offset.tolist(), strict=True):
            self.shards[source_index].read_into(row, start)
        ids = torch.from_numpy(rows)
        tokens = ids[:, :-1].contiguous()
        targets = ids[:, 1:].contiguous()
        doc_starts = None if self.eos is None else find_doc_starts(tokens, self.eos)
        return Batch(tokens, targets, doc_starts, torch.from_numpy(source))

    def micro_batches(
        self,
        token: int,
        sequences: int,
        rank: int,
        ranks: int,
        micro_batch: int,
        equal: bool = False,
    ) -> Iterator[tuple[Batch, bool]]:
        """Yield this rank's micro-batches of the global batch at `token`, each with is_padding.

        The batch has `sequences` sequences; ranks may get unequal numbers. A rank without data
        gets a padding sequence of weight zero, so that every rank enters the same collectives.
        With `equal` all ranks get as many micro-batches as the rank with the most.
        """
        stage = self.plan.stage_at(token)
        first = (token - stage.first_token) // stage.seq_len
        for start, end in split_batch(sequences, rank, ranks, micro_batch, equal):
            indices = np.arange(start, end) if start < end else np.zeros(1, dtype=np.int64)
            yield self.read(stage, first + indices), start == end


def split_batch(
    sequences: int, rank: int, ranks: int, micro_batch: int, equal: bool
) -> list[tuple[int, int]]:
    """Return [start, end) of the sequences of each micro-batch of a rank; (0, 0) is padding."""
    first = sequences * rank // ranks
    end = sequences * (rank + 1) // ranks
    spans = [(start, min(start + micro_batch, end)) for start in range(first, end, micro_batch)]
    min_count = -(-sequences // (ranks * micro_batch)) if equal else 1
    return spans + [(0, 0)] * (min_count - len(spans))
