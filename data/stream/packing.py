"""Tables of what a plan reads: tokens and epochs per source and stage, documents per sequence."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.stream.documents import document_ends
from data.stream.manifests import Manifest, source_folder
from data.stream.mixture import Plan, PlannedStage

PIECE = 2**22  # documents that are looked at at once


def stage_tokens(plan: Plan, stage: PlannedStage) -> dict[str, int]:
    """Tokens that a stage reads of every source."""
    blocks = stage.counts(stage.tokens // plan.block_tokens)
    return {
        name: int(count) * plan.block_tokens
        for name, count in zip(plan.sources, blocks, strict=True)
    }


def plan_table(plan: Plan) -> list[str]:
    """Lines: tokens of every source per stage, their sum, and the epochs that they are."""
    wide = max(14, *(len(stage.name) + 2 for stage in plan.stages))
    lines = [f"{'source':<14}" + "".join(f"{stage.name:>{wide}}" for stage in plan.stages)]
    lines[0] += f"{'all':>22}{'epochs':>9}{'limit':>7}"
    read, epochs = [stage_tokens(plan, stage) for stage in plan.stages], plan.epochs()
    for name in plan.sources:
        row = "".join(f"{tokens[name] / 1e9:>{wide - 1}.2f}G" for tokens in read)
        limit = plan.config.sources[name].max_epochs
        lines.append(
            f"{name:<14}{row}{sum(tokens[name] for tokens in read):>22,}"
            f"{epochs[name]:>9.3f}{limit:>7g}"
        )
    row = "".join(f"{stage.tokens / 1e9:>{wide - 1}.2f}G" for stage in plan.stages)
    return [*lines, f"{'all':<14}{row}{plan.tokens:>22,}"]


@dataclass
class Packing:
    """How the documents of a source lie in sequences of one length."""

    documents: int
    cut: int  # documents that a border of sequences runs through
    pieces: int  # parts of documents, over all sequences
    sequences: float

    @property
    def per_sequence(self) -> float:
        """Documents, or parts of them, in a sequence."""
        return self.pieces / max(1.0, self.sequences)

    @property
    def cut_share(self) -> float:
        """Share of the documents that are cut."""
        return self.cut / max(1, self.documents)


def spans(
    folder: Path, manifest: Manifest
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """First and past-the-last token of a source's train documents, over all shards, in pieces."""
    offset = 0
    for file in manifest.splits["train"]:
        ends = document_ends(folder, file)
        last = offset
        for start in range(0, len(ends), PIECE):
            past = np.asarray(ends[start : start + PIECE], dtype=np.int64) + offset
            yield np.concatenate([[last], past[:-1]]), past
            last = int(past[-1])
        offset += file.tokens


def packing_of(folder: Path, manifest: Manifest, seq_len: int) -> Packing:
    """Exact counts over all train documents of a source; memory does not grow with it."""
    found = Packing(0, 0, 0, manifest.tokens("train") / seq_len)
    for first, past in spans(folder, manifest):
        low, high = first // seq_len, (past - 1) // seq_len
        found.documents += len(first)
        found.cut += int((low != high).sum())
        found.pieces += int((high - low + 1).sum())
    return found


def packing(plan: Plan, manifests: dict[str, Manifest]) -> list[str]:
    """Lines: documents per sequence and share of cut documents, per stage (mixed) and source."""
    lines = [
        f"{'stage':<22}{'context':>9}{'documents per sequence':>25}{'documents cut':>16}  per "
        "source"
    ]
    known: dict[tuple[str, int], Packing] = {}
    for stage in plan.stages:
        read = {name: tokens for name, tokens in stage_tokens(plan, stage).items() if tokens}
        for name in read:
            if (name, stage.seq_len) not in known:
                folder = source_folder(plan.config, name)
                known[name, stage.seq_len] = packing_of(folder, manifests[name], stage.seq_len)
        each = {name: known[name, stage.seq_len] for name in read}
        sequences = {name: tokens / stage.seq_len for name, tokens in read.items()}
        pieces = sum(each[name].per_sequence * sequences[name] for name in read) / sum(
            sequences.values()
        )
        whole = {
            name: each[name].documents / max(1.0, each[name].sequences) * sequences[name]
            for name in read
        }
        cut = sum(each[name].cut_share * whole[name] for name in read) / max(
            1e-9, sum(whole.values())
        )
        detail = ", ".join(
            f"{name} {one.per_sequence:.1f} / {one.cut_share:.0%}" for name, one in each.items()
        )
        lines.append(f"{stage.name:<22}{stage.seq_len:>9}{pieces:>25.2f}{cut:>16.1%}  {detail}")
    return lines
