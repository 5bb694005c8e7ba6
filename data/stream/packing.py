"""Tables of what a plan reads: tokens and epochs per source and stage, documents per sequence."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.units import short
from data.stream.documents import document_ends
from data.stream.manifests import Manifest, source_folder
from data.stream.mixture import Plan, PlannedStage

DOCUMENTS_PER_READ = 2**22


def stage_tokens(plan: Plan, stage: PlannedStage) -> dict[str, int]:
    """Tokens that a stage reads of every source."""
    blocks = stage.source_blocks(stage.tokens // plan.block_tokens)
    return {
        name: int(count) * plan.block_tokens
        for name, count in zip(plan.sources, blocks, strict=True)
    }


def plan_table(plan: Plan) -> list[str]:
    """Lines of a table: tokens per source and stage, their sum, and epochs."""
    width = max(14, *(len(stage.name) + 2 for stage in plan.stages))
    lines = [f"{'source':<14}" + "".join(f"{stage.name:>{width}}" for stage in plan.stages)]
    lines[0] += f"{'all':>22}{'epochs':>9}{'limit':>7}"
    per_stage = [stage_tokens(plan, stage) for stage in plan.stages]
    epochs = plan.epochs()
    for name in plan.sources:
        row = "".join(f"{short(tokens[name]):>{width}}" for tokens in per_stage)
        limit = plan.config.sources[name].max_epochs
        lines.append(
            f"{name:<14}{row}{sum(tokens[name] for tokens in per_stage):>22,}"
            f"{epochs[name]:>9.3f}{limit:>7g}"
        )
    row = "".join(f"{short(stage.tokens):>{width}}" for stage in plan.stages)
    return [*lines, f"{'all':<14}{row}{plan.tokens:>22,}"]


@dataclass
class PackingStats:
    """How the documents of a source fill sequences of one length."""

    documents: int
    split_documents: int  # documents in more than one sequence
    fragments: int  # documents or parts of documents, summed over sequences
    sequences: float

    @property
    def documents_per_sequence(self) -> float:
        """Documents, whole or in part, per sequence."""
        return self.fragments / max(1.0, self.sequences)

    @property
    def split_fraction(self) -> float:
        """Fraction of the documents that are split."""
        return self.split_documents / max(1, self.documents)


def document_spans(
    folder: Path, manifest: Manifest
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield [start, end) of a source's train documents, DOCUMENTS_PER_READ at a time."""
    offset = 0
    for file in manifest.splits["train"]:
        ends = document_ends(folder, file)
        previous_end = offset
        for first in range(0, len(ends), DOCUMENTS_PER_READ):
            end = np.asarray(ends[first : first + DOCUMENTS_PER_READ], dtype=np.int64) + offset
            yield np.concatenate([[previous_end], end[:-1]]), end
            previous_end = int(end[-1])
        offset += file.tokens


def measure_packing(folder: Path, manifest: Manifest, seq_len: int) -> PackingStats:
    """Count exactly over all train documents of a source, in constant memory."""
    stats = PackingStats(0, 0, 0, manifest.tokens("train") / seq_len)
    for start, end in document_spans(folder, manifest):
        first_sequence = start // seq_len
        last_sequence = (end - 1) // seq_len
        stats.documents += len(start)
        stats.split_documents += int((first_sequence != last_sequence).sum())
        stats.fragments += int((last_sequence - first_sequence + 1).sum())
    return stats


def packing_table(plan: Plan, manifests: dict[str, Manifest]) -> list[str]:
    """Lines of a table per stage: documents per sequence and documents split, also per source."""
    lines = [
        f"{'stage':<22}{'context':>9}{'documents per sequence':>25}{'documents split':>16}  per "
        "source"
    ]
    measured: dict[tuple[str, int], PackingStats] = {}
    for stage in plan.stages:
        tokens = {name: count for name, count in stage_tokens(plan, stage).items() if count}
        for name in tokens:
            if (name, stage.seq_len) not in measured:
                folder = source_folder(plan.config, name)
                measured[name, stage.seq_len] = measure_packing(
                    folder, manifests[name], stage.seq_len
                )
        stats = {name: measured[name, stage.seq_len] for name in tokens}
        sequences = {name: count / stage.seq_len for name, count in tokens.items()}
        documents = {
            name: stats[name].documents / max(1.0, stats[name].sequences) * sequences[name]
            for name in tokens
        }
        fragments = sum(stats[name].documents_per_sequence * sequences[name] for name in tokens)
        split = sum(stats[name].split_fraction * documents[name] for name in tokens)
        per_sequence = fragments / sum(sequences.values())
        split_fraction = split / max(1e-9, sum(documents.values()))
        per_source = ", ".join(
            f"{name} {each.documents_per_sequence:.1f} / {each.split_fraction:.0%}"
            for name, each in stats.items()
        )
        lines.append(
            f"{stage.name:<22}{stage.seq_len:>9}{per_sequence:>25.2f}{split_fraction:>16.1%}  "
            f"{per_source}"
        )
    return lines
