"""Corpora that Megatron-LM's preprocessing has tokenized: `.bin` holds ids, `.idx` the documents'
borders.

Format of megatron/core/datasets/indexed_dataset.py: MMIDIDX and two zeros, u64 version 1, u8 type,
u64 sequences, u64 borders, i32 lengths [sequences], i64 pointers in bytes [sequences], i64 first
sequence of every document and the number of sequences [borders]. Such a source has the recipe
`megatron`; its documents become shards like any other's, split by held-out share, ended by one end
token, and pinned by a manifest. How they were cleaned, nobody here can say.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from datatrove.io import get_datafolder
from numpy.typing import NDArray

from core.errors import InputError
from data.pipeline.accounting import Step
from data.pipeline.shard import describe, split_of
from data.recipes import MEGATRON
from data.stream.manifests import DTYPE, SPLITS, Manifest
from data.tokenizer import EOS

RECIPE_VERSION = 1
MAGIC = b"MMIDIDX\x00\x00"
# DType of indexed_dataset.py, whole numbers only
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass
class Corpus:
    """How a folder of `.bin` and `.idx` becomes the shards of a source."""

    input: str
    files: list[str]  # names of `.idx`
    folder: Path  # under construction
    vocab_size: int
    tasks: int


def raw_files(folder: str) -> tuple[str, dict[str, list[Any]]]:
    """Kind, and [bytes of both, time of change] per `.idx`; InputError for one without its pair."""
    place = get_datafolder(folder)
    found = place.find("", detail=True) if place.isdir("") else {}
    names = sorted(name for name in found if name.endswith(".idx"))
    if not names:
        raise InputError(
            f"input folder {folder} has no .idx files: set data.sources.<name>.input to "
            "Megatron's output"
        )
    alone = [name for name in names if binary(name) not in found]
    if alone:
        raise InputError(f"input folder {folder} has {alone[0]} without {binary(alone[0])}")
    sizes = {name: found[name]["size"] + found[binary(name)]["size"] for name in names}
    return MEGATRON, {name: [sizes[name], str(found[binary(name)].get("mtime"))] for name in names}


def binary(index: str) -> str:
    """The `.bin` of an `.idx`."""
    return index.removesuffix(".idx") + ".bin"


def read_index(file: BinaryIO, name: str) -> tuple[np.dtype, NDArray[np.int64], NDArray[np.int64]]:
    """Type of the ids, first byte [documents + 1], and number of ids before [documents + 1].

    Raises InputError for what is no index or holds no ids.
    """
    head = file.read(len(MAGIC) + 8 + 1 + 16)
    version, kind = head[len(MAGIC) : len(MAGIC) + 8], head[len(MAGIC) + 8 : len(MAGIC) + 9]
    if head[: len(MAGIC)] != MAGIC or version != (1).to_bytes(8, "little") or kind[0] not in DTYPES:
        raise InputError(
            f"{name} is no index of Megatron's version 1 with whole numbers: take it out of the "
            "input"
        )
    dtype = np.dtype(DTYPES[kind[0]])
    sequences, documents = np.frombuffer(head[-16:], dtype="<u8").astype(int).tolist()
    lengths = np.frombuffer(file.read(4 * sequences), dtype="<i4").astype(np.int64)
    file.seek(8 * sequences, 1)  # pointers: sequences follow each other
    borders = np.frombuffer(file.read(8 * documents), dtype="<i8")
    if (
        len(lengths) != sequences
        or len(borders) != documents
        or (documents and borders[-1] != sequences)
    ):
        raise InputError(f"{name} is cut off: fetch it again")
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])[borders]
    return dtype, ends * dtype.itemsize, ends


def documents_of(job: Corpus, name: str) -> Iterator[NDArray[np.int64]]:
    """Ids of every document of a pair of files, each ended by its only end token; one inside ends a
    document too.

    Raises InputError for ids outside the vocabulary, and for a file that is too short.
    """
    place = get_datafolder(job.input)
    with place.open(name, "rb") as file:
        dtype, first, _ = read_index(file, name)
    with place.open(binary(name), "rb") as file:
        for number, (start, end) in enumerate(zip(first[:-1], first[1:], strict=True)):
            raw = file.read(int(end - start))
            if len(raw) != end - start:
                raise InputError(f"{binary(name)} ends inside document {number}: fetch it again")
            ids = np.frombuffer(raw, dtype=dtype).astype(np.int64)
            if len(ids) and (ids.min() < 0 or ids.max() >= job.vocab_size):
                raise InputError(
                    f"{binary(name)}, document {number} has id {ids.max()}; the vocabulary has "
                    f"{job.vocab_size}: set data.tokenizer.path to the one it was made with"
                )
            ids = ids if len(ids) and ids[-1] == EOS else np.append(ids, EOS)
            yield from np.split(ids, np.flatnonzero(ids == EOS)[:-1] + 1)


def shard_task(job: Corpus, heldout_percent: float, rank: int) -> list[dict[str, Any]]:
    """Write one task's files as shards; returns non-empty splits' ShardFiles as plain values."""
    mark = job.folder / f"{rank:05d}.done"
    paths = {split: job.folder / f"{split}_{rank:05d}.ds" for split in SPLITS}
    if not mark.is_file():
        ends: dict[str, list[int]] = {split: [] for split in SPLITS}
        files = {split: path.open("wb", buffering=2**20) for split, path in paths.items()}
        try:
            for name in job.files[rank :: job.tasks]:
                for number, ids in enumerate(documents_of(job, name)):
                    split = split_of(f"{name}/{number}", heldout_percent)
                    files[split].write(ids.astype(DTYPE).tobytes())
                    ends[split].append((ends[split][-1] if ends[split] else 0) + len(ids))
        finally:
            for file in files.values():
                file.close()
        for split, path in paths.items():
            np.array(ends[split], dtype="<u8").tofile(path.with_suffix(".ds.index"))
            if not ends[split]:
                path.unlink()
                path.with_suffix(".ds.index").unlink()
        mark.touch()
    return [asdict(describe(path)) for path in paths.values() if path.is_file()]


def step(manifest: Manifest) -> Step:
    """The one step of such a source: all documents of the index are in the shards."""
    documents = sum(file.documents for file in manifest.files())
    return Step("Megatron index", documents, documents, {})
