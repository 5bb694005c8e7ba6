"""Tokenize clean documents into a source's shards, and read the text that trains a tokenizer."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray
from tokenizers import Tokenizer

from core.files import read_regular, sha256_of
from data import tokenizer
from data.pipeline.accounting import StepCounts
from data.pipeline.tasks import run_task
from data.readers.inputs import DocumentReader
from data.stream.manifests import SPLITS, ShardFile, id_dtype
from data.vocabulary import end_id, required_vocab_size

VERSION = 1  # raise with the split, the order inside a shard, or the tokenized text
HASH_BUCKETS = 1_000_000
BATCH_CHARACTERS = 2**21  # text tokenized at once; bounds memory for documents of any length
PIECE_CHARACTERS = 2**20  # the tokenizer is slow on longer text
SEAM_CHARACTERS = 200  # on both sides of a line break, tokenized to try a split there
SEAM_TRIES = 100


@dataclass
class CleanDocuments:
    """A finished folder of clean documents."""

    folder: Path
    files: list[str]  # other files in the folder are ignored
    steps: list[StepCounts]  # document counts from the input to the clean documents

    @property
    def documents(self) -> int:
        """Number of clean documents."""
        return self.steps[-1].forwarded


@dataclass
class ShardingSpec:
    """Inputs and settings that turn clean documents into the shards of a source."""

    clean: CleanDocuments
    folder: Path  # of the shards being built
    tokenizer_file: Path
    seed: int  # for the order of documents inside a shard
    heldout_percent: float
    tasks: int


def split_of(group: str, heldout_percent: float) -> str:
    """Split of a document, "train" or "heldout".

    Depends only on the group, so new documents never move existing ones to the other split.
    """
    bucket = int(hashlib.sha256(f"heldout:{group}".encode()).hexdigest(), 16) % HASH_BUCKETS
    return "heldout" if bucket < heldout_percent / 100 * HASH_BUCKETS else "train"


def clean_reader(clean: CleanDocuments) -> DocumentReader:
    """Reader of the listed files of clean documents."""
    return DocumentReader(str(clean.folder), clean.files)


def pieces_of(vocabulary: Tokenizer, text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """Split long text into pieces that tokenize to the same ids as the whole.

    Text without a place to split stays whole.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        end = find_seam(vocabulary, text, start, start + size)
        if end is None:
            break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def find_seam(vocabulary: Tokenizer, text: str, start: int, stop: int) -> int | None:
    """The last line break in (start + 1, stop) at which both sides tokenize independently.

    It is between two visible characters. Many vocabularies have none after punctuation (Llama 3,
    Qwen), or none at all, since they put a space before every text (Llama 2).
    """
    end, tries = stop, 0
    while (end := text.rfind("\n", start + 1, end)) > start + 1 and tries < SEAM_TRIES:
        if text[end - 1].isspace() or text[end + 1].isspace():
            continue
        before = text[max(start, end - SEAM_CHARACTERS) : end]
        after = text[end : end + SEAM_CHARACTERS]
        whole, *sides = (
            vocabulary.encode(part, add_special_tokens=False).ids
            for part in (before + after, before, after)
        )
        if whole == sides[0] + sides[1]:
            return end
        tries += 1
    return None


def batches(
    documents: Iterable[Document], size: int = BATCH_CHARACTERS
) -> Iterator[list[Document]]:
    """Group documents into lists with about `size` characters of text each."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode(
    vocabulary: Tokenizer, eos: int, dtype: np.dtype, texts: list[str]
) -> Iterator[NDArray[np.unsignedinteger]]:
    """Ids of every text, with the end token. A special token inside a text is ordinary text."""
    pieces = [pieces_of(vocabulary, text) for text in texts]
    flat = [piece for text_pieces in pieces for piece in text_pieces]
    encodings = iter(vocabulary.encode_batch_fast(flat, add_special_tokens=False))
    for text_pieces in pieces:
        ids = [np.array(next(encodings).ids, dtype=dtype) for _ in text_pieces]
        yield np.concatenate([*ids, np.array([eos], dtype=dtype)])


class TokenWriter(PipelineStep):
    """Tokenizes a task's documents into one file per split, then shuffles each file with the seed.

    The files have datatrove's format: `.ds` holds the ids, `.ds.index` the end of every document
    in tokens, uint64.
    """

    name = "Tokens"
    type = "Writer"

    def __init__(self, spec: ShardingSpec) -> None:
        super().__init__()
        self.spec = spec

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Tokenize and write all documents of the task."""
        vocabulary = tokenizer.load(self.spec.tokenizer_file)
        vocabulary.encode_special_tokens = True
        eos = end_id(self.spec.tokenizer_file, vocabulary)
        dtype = id_dtype(required_vocab_size(vocabulary))
        ends: dict[str, list[int]] = {split: [] for split in SPLITS}
        paths = {split: self.spec.folder / f"{split}_{rank:05d}.part" for split in SPLITS}
        files = {split: path.open("wb") for split, path in paths.items()}
        try:
            for batch in batches(data):
                self.stat_update("total", value=len(batch))
                for document, ids in zip(
                    batch, encode(vocabulary, eos, dtype, [d.text for d in batch]), strict=True
                ):
                    split = split_of(document.metadata["group"], self.spec.heldout_percent)
                    files[split].write(ids.data)
                    ends[split].append((ends[split][-1] if ends[split] else 0) + len(ids))
        finally:
            for file in files.values():
                file.close()
        for number, split in enumerate(SPLITS):
            order = np.random.default_rng([self.spec.seed, rank, number]).permutation(
                len(ends[split])
            )
            shuffle(paths[split], dtype, ends[split], order)


def shuffle(path: Path, dtype: np.dtype, ends: list[int], order: NDArray[np.int64]) -> None:
    """Rewrite a `.part` file as `.ds` and `.ds.index` with its documents in `order`.

    Writes no file if there are no documents.
    """
    if ends:
        tokens = np.memmap(path, dtype=dtype, mode="r")
        starts = np.array([0, *ends[:-1]], dtype=np.int64)
        lengths = np.array(ends, dtype=np.int64) - starts
        with path.with_suffix(".ds").open("wb", buffering=2**20) as file:
            for document in order:
                file.write(tokens[starts[document] : starts[document] + lengths[document]].data)
        np.cumsum(lengths[order]).astype("<u8").tofile(path.with_suffix(".ds.index"))
    path.unlink()


def shard_task(spec: ShardingSpec, rank: int) -> list[dict[str, Any]]:
    """Tokenize one task's documents; returns the ShardFiles of non-empty splits as dicts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tasks already run in parallel
    steps = [clean_reader(spec.clean), TokenWriter(spec)]
    run_task(steps, spec.folder / "logs", rank, spec.tasks)
    vocabulary = tokenizer.load(spec.tokenizer_file)
    eos, vocab_size = end_id(spec.tokenizer_file, vocabulary), required_vocab_size(vocabulary)
    paths = [spec.folder / f"{split}_{rank:05d}.ds" for split in SPLITS]
    return [asdict(describe_shard(path, eos, vocab_size)) for path in paths if path.is_file()]


def describe_shard(path: Path, eos: int, vocab_size: int) -> ShardFile:
    """Counts and hash of a shard.

    Raises ValueError unless its end tokens are where its index ends documents, and all ids are of
    the vocabulary. Raises OSError if a file cannot be read.
    """
    index_path = path.with_name(path.name + ".index")
    content = read_regular(index_path)
    if len(content) % 8:
        raise ValueError(f"{index_path} has {len(content)} bytes, which are no 64-bit numbers")
    index = np.frombuffer(content, dtype="<u8")
    tokens = np.memmap(path, dtype=id_dtype(vocab_size), mode="r")
    total = int(index[-1]) if len(index) else 0
    if len(tokens) != total:
        raise ValueError(f"{path} has {len(tokens)} tokens, its index says {total}")
    block = 2**24  # tokens compared at once
    ends = 0
    for start in range(0, len(tokens), block):
        ids = tokens[start : start + block]
        if ids.max() >= vocab_size:
            place = start + int(np.argmax(ids >= vocab_size))
            raise ValueError(
                f"{path} has id {tokens[place]} at token {place}, its vocabulary has {vocab_size:,}"
            )
        found = start + 1 + np.flatnonzero(ids == eos)
        if not np.array_equal(found, index[ends : ends + len(found)]):
            raise ValueError(f"{path} has end tokens that are not where {index_path.name} has them")
        ends += len(found)
    if ends != len(index):
        raise ValueError(f"{path} has {ends} end tokens for {len(index)} documents")
    return ShardFile(path.name, len(tokens), len(index), sha256_of(path))


def train_texts(
    sources: list[CleanDocuments], heldout_percent: float, max_bytes: int
) -> Iterator[str]:
    """Train-split texts up to `max_bytes`, each from the source with the fewest bytes so far."""
    streams = {index: clean_reader(source).run() for index, source in enumerate(sources)}
    bytes_read = dict.fromkeys(streams, 0)
    while streams and sum(bytes_read.values()) < max_bytes:
        index = min(streams, key=lambda index: (bytes_read[index], index))
        document = next(streams[index], None)
        if document is None:
            del streams[index]
        elif split_of(document.metadata["group"], heldout_percent) == "train":
            bytes_read[index] += len(document.text.encode())
            yield document.text


def tokenizer_task(
    sources: list[CleanDocuments],
    heldout_percent: float,
    max_bytes: int,
    vocab_size: int,
    out: Path,
) -> None:
    """Train a tokenizer on the train split of the sources and write it to the folder `out`."""
    tokenizer.train(train_texts(sources, heldout_percent, max_bytes), vocab_size, out)
