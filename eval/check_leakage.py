"""Prove that validation is held out: read every training shard once, and fail where one holds a
validation document.

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
from data.stream.manifests import DTYPE, Manifest, open_manifests, source_folder
from data.stream.shards import Shards
from data.tokenizer import EOS
from eval.config import EvaluationConfig, ValidationConfig
from eval.heldout import files_apart, fixed_tokens

logger = logging.getLogger(__name__)

READ_TOKENS = 1 << 24  # of a training shard at once


def documents(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length (with end-of-text) and token sum of each document that is whole in ids [t]."""
    ends = np.flatnonzero(ids == EOS) + 1
    if not len(ends):
        return ends, ends, ends
    starts = np.concatenate([[0], ends[:-1]])
    return starts, ends - starts, np.add.reduceat(ids, starts)


def digest(ids: np.ndarray) -> bytes:
    """SHA-256 of a document's tokens as they lie in a shard."""
    return hashlib.sha256(ids.astype(DTYPE).tobytes()).digest()


def trained_documents(
    config: DataConfig, manifests: dict[str, Manifest], settings: ValidationConfig
) -> Iterator[tuple[str, str, int]]:
    """Held-out documents that a training shard holds too: (source, trained in, times)."""
    # length and sum first: few need a hash
    held: dict[tuple[int, int], dict[bytes, str]] = defaultdict(dict)
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
    manifests = open_manifests(config.data)
    files_apart(manifests)
    shared = list(trained_documents(config.data, manifests, config.validation))
    if shared:
        lines = "; ".join(f"{times} of {owner} in {name}" for owner, name, times in shared)
        raise InputError(
            f"held-out documents are in the training shards: {lines}. Deduplicate across splits"
        )
    logger.info("no document of validation is in a training shard")


main = command(EvaluationConfig)(prove)

if __name__ == "__main__":
    main()
