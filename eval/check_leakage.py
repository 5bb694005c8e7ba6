"""Check that no training shard contains a validation document.

Reads every training shard once and compares documents by hash.

examples:
  python eval/check_leakage.py +experiment=demo
"""

import hashlib
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

import numpy as np

from core.command import command
from core.errors import InputError
from data.config import DataConfig
from data.stream.manifests import Manifest, open_manifests, source_folder
from data.stream.shards import Shards
from eval.config import EvaluationConfig, ValidationConfig
from eval.heldout import check_split_files, read_validation_tokens

logger = logging.getLogger(__name__)

READ_TOKENS = 1 << 24  # of a training shard per read


def document_bounds(ids: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length (with end-of-text) and token sum of each document that ends in ids [t]."""
    ends = np.flatnonzero(ids == eos) + 1
    if not len(ends):
        return ends, ends, ends
    starts = np.concatenate([[0], ends[:-1]])
    return starts, ends - starts, np.add.reduceat(ids, starts)


def document_hash(ids: np.ndarray) -> bytes:
    """SHA-256 of a document's tokens, int64 [t]."""
    return hashlib.sha256(ids.tobytes()).digest()


def leaked_documents(
    config: DataConfig, manifests: dict[str, Manifest], settings: ValidationConfig
) -> Iterator[tuple[str, str, int]]:
    """Yield (validation source, training source, count) of documents in both splits."""
    # compare lengths and token sums first, so that few documents are hashed
    heldout: dict[tuple[int, int], dict[bytes, str]] = defaultdict(dict)
    for name, manifest in manifests.items():
        ids = read_validation_tokens(config, name, manifest, settings)
        for start, length, token_sum in zip(*document_bounds(ids, manifest.eos), strict=True):
            hashes = heldout[int(length), int(token_sum)]
            hashes[document_hash(ids[start : start + length])] = name
    keys = np.array(sorted(length << 32 | total for length, total in heldout), dtype=np.int64)
    for name, manifest in manifests.items():
        counts: dict[str, int] = defaultdict(int)
        for ids in _read_training_tokens(config, name, manifest):
            starts, lengths, token_sums = document_bounds(ids, manifest.eos)
            for index in np.flatnonzero(np.isin(lengths << 32 | token_sums, keys)):
                start = int(starts[index])
                length = int(lengths[index])
                hashes = heldout[length, int(token_sums[index])]
                source = hashes.get(document_hash(ids[start : start + length]))
                if source is not None:
                    counts[source] += 1
        yield from ((source, name, count) for source, count in counts.items())


def _read_training_tokens(
    config: DataConfig, name: str, manifest: Manifest
) -> Iterator[np.ndarray]:
    """Yield a source's training tokens in blocks that start with a document."""
    shards = Shards(source_folder(config, name), manifest, "train")
    start = 0
    while start < shards.tokens:
        ids = shards.read(start, min(READ_TOKENS, shards.tokens - start))
        yield ids
        ends = np.flatnonzero(ids == manifest.eos)
        start += int(ends[-1]) + 1 if len(ends) else len(ids)


def check_leakage(config: EvaluationConfig) -> None:
    """Raise InputError that lists the validation documents found in training shards."""
    manifests = open_manifests(config.data)
    check_split_files(manifests)
    leaked = list(leaked_documents(config.data, manifests, config.validation))
    if leaked:
        counts = "; ".join(f"{count} of {source} in {name}" for source, name, count in leaked)
        raise InputError(
            f"training shards contain held-out documents: {counts}. Deduplicate across splits"
        )
    logger.info("no training shard contains a validation document")


main = command(EvaluationConfig)(check_leakage)

if __name__ == "__main__":
    main()
