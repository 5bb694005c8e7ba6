"""Corpora tokenized by Megatron-LM's preprocessing: `.bin` holds ids, `.idx` document boundaries.

Format of megatron/core/datasets/indexed_dataset.py: MMIDIDX and two zeros, u64 version 1, u8 dtype
code, u64 number of sequences, u64 length of the document index, i32 lengths [sequences], i64
pointers in bytes [sequences], i64 document index: first sequence of every document, then the number
of sequences. A source with the recipe `megatron` is split, ended with one end token per document
and pinned by a manifest like any other. How its text was cleaned is not recorded.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from datatrove.io import get_datafolder
from numpy.typing import NDArray

from core.errors import InputError
from core.files import sync_filesystem
from data.pipeline.accounting import StepCounts
from data.pipeline.shard import describe_shard, split_of
from data.readers.listing import Listing, count_ignored, find_files, suffixes_of
from data.recipes import MEGATRON
from data.stream.manifests import SPLITS, Manifest, id_dtype

RECIPE_VERSION = 1
MAGIC = b"MMIDIDX\x00\x00"
# DType codes of indexed_dataset.py, integers only
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass
class MegatronCorpus:
    """Inputs and settings that turn `.bin` and `.idx` files into the shards of a source."""

    input: str
    files: list[str]  # names of `.idx`
    folder: Path  # of the shards being built
    eos: int
    vocab_size: int
    tasks: int


def list_raw_files(folder: str) -> Listing:
    """List a folder's corpora, with the bytes of `.idx` and `.bin` by the name of `.idx`.

    Raises InputError for a folder without `.idx` files and for an `.idx` without its `.bin`.
    """
    _, files = find_files(folder)
    names = sorted(name for name in files if name.endswith(".idx"))
    if not names:
        raise InputError(
            f"input folder {folder} has no .idx files: set data.sources.<name>.input to "
            "Megatron's output"
        )
    unpaired = [name for name in names if bin_name(name) not in files]
    if unpaired:
        raise InputError(f"input folder {folder} has {unpaired[0]} without {bin_name(unpaired[0])}")
    sizes = {name: files[name]["size"] + files[bin_name(name)]["size"] for name in names}
    others = files.keys() - {*names, *map(bin_name, names)}
    return Listing(
        MEGATRON,
        {name: [sizes[name], str(files[bin_name(name)].get("mtime"))] for name in names},
        count_ignored({name: suffixes_of(name) or "no suffix" for name in others}),
    )


def bin_name(index: str) -> str:
    """Name of the `.bin` file of an `.idx` file."""
    return index.removesuffix(".idx") + ".bin"


def read_index(file: BinaryIO, name: str) -> tuple[np.dtype, NDArray[np.int64]]:
    """dtype of the ids, and offsets of the documents in ids, int64 [documents + 1].

    Raises InputError if the file is not an index, is truncated, or describes floats.
    """
    header = file.read(len(MAGIC) + 8 + 1 + 16)
    version, code = header[len(MAGIC) : len(MAGIC) + 8], header[len(MAGIC) + 8 : len(MAGIC) + 9]
    if (
        header[: len(MAGIC)] != MAGIC
        or version != (1).to_bytes(8, "little")
        or code[0] not in DTYPES
    ):
        raise InputError(
            f"{name} is not a Megatron index of version 1 with integer ids: remove it from the "
            "input folder"
        )
    sequences, entries = np.frombuffer(header[-16:], dtype="<u8").astype(int).tolist()
    lengths = np.frombuffer(file.read(4 * sequences), dtype="<i4").astype(np.int64)
    file.seek(8 * sequences, 1)  # skip the pointers: sequences are contiguous
    document_index = np.frombuffer(file.read(8 * entries), dtype="<i8")
    if (
        len(lengths) != sequences
        or len(document_index) != entries
        or (entries and document_index[-1] != sequences)
    ):
        raise InputError(f"{name} is truncated: download it again")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return np.dtype(DTYPES[code[0]]), offsets[document_index]


def read_documents(corpus: MegatronCorpus, name: str) -> Iterator[NDArray[np.int64]]:
    """Ids of every document of an `.idx` and its `.bin`, with exactly one end token, the last id.

    An end token inside a document splits it. Raises InputError for ids outside the vocabulary and
    for a truncated file.
    """
    input_folder = get_datafolder(corpus.input)
    with input_folder.open(name, "rb") as file:
        dtype, offsets = read_index(file, name)
    with input_folder.open(bin_name(name), "rb") as file:
        for number, length in enumerate(np.diff(offsets)):
            num_bytes = int(length) * dtype.itemsize
            raw = file.read(num_bytes)
            if len(raw) != num_bytes:
                raise InputError(
                    f"{bin_name(name)} is truncated inside document {number}: download it again"
                )
            ids = np.frombuffer(raw, dtype=dtype).astype(np.int64)
            invalid = ids[(ids < 0) | (ids >= corpus.vocab_size)]
            if len(invalid):
                raise InputError(
                    f"{bin_name(name)}: document {number} has id {invalid[0]}, the tokenizer has "
                    f"{corpus.vocab_size} ids: set data.tokenizer.path to the corpus's tokenizer"
                )
            ids = ids if len(ids) and ids[-1] == corpus.eos else np.append(ids, corpus.eos)
            yield from np.split(ids, np.flatnonzero(ids == corpus.eos)[:-1] + 1)


def shard_task(corpus: MegatronCorpus, heldout_percent: float, rank: int) -> list[dict[str, Any]]:
    """Write one task's files as shards; returns the ShardFiles of non-empty splits as dicts."""
    dtype = id_dtype(corpus.vocab_size)
    done = corpus.folder / f"{rank:05d}.done"
    paths = {split: corpus.folder / f"{split}_{rank:05d}.ds" for split in SPLITS}
    if not done.is_file():
        ends: dict[str, list[int]] = {split: [] for split in SPLITS}
        files = {split: path.open("wb", buffering=2**20) for split, path in paths.items()}
        try:
            for name in corpus.files[rank :: corpus.tasks]:
                for number, ids in enumerate(read_documents(corpus, name)):
                    split = split_of(f"{name}/{number}", heldout_percent)
                    files[split].write(ids.astype(dtype).tobytes())
                    ends[split].append((ends[split][-1] if ends[split] else 0) + len(ids))
        finally:
            for file in files.values():
                file.close()
        for split, path in paths.items():
            np.array(ends[split], dtype="<u8").tofile(path.with_suffix(".ds.index"))
            if not ends[split]:
                path.unlink()
                path.with_suffix(".ds.index").unlink()
        sync_filesystem(corpus.folder)
        done.touch()
    return [
        asdict(describe_shard(path, corpus.eos, corpus.vocab_size))
        for path in paths.values()
        if path.is_file()
    ]


def step_counts(manifest: Manifest) -> StepCounts:
    """Counts of the only step of a Megatron source: every document of the index is in a shard."""
    documents = sum(file.documents for file in manifest.files())
    return StepCounts("Megatron index", documents, documents, {})
