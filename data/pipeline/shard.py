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

from core.files import sha256_of
from data import tokenizer
from data.pipeline.accounting import StepCounts
from data.pipeline.tasks import run_task
from data.readers.inputs import DocumentReader
from data.stream.manifests import DTYPE, SPLITS, ShardFile

VERSION = 1  # raise with the split, the order inside a shard, or the tokenized text
HASH_BUCKETS = 1_000_000
BATCH_CHARACTERS = 2**21  # text tokenized at once; bounds memory for documents of any length
PIECE_CHARACTERS = 2**20  # the tokenizer is slow on longer text


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


def pieces_of(text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """Split long text into pieces that tokenize to the same ids as the whole.

    Every piece starts at a line break between two visible characters. Text without one stays whole.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        end = text.rfind("\n", start + 1, start + size)
        while end > start + 1 and (text[end - 1].isspace() or text[end + 1].isspace()):
            end = text.rfind("\n", start + 1, end)
        if end <= start + 1:
            break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


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


def encode(vocabulary: Tokenizer, texts: list[str]) -> Iterator[NDArray[np.uint16]]:
    """Ids of every text, with the end token. <|endoftext|> inside a text is ordinary text."""
    pieces = [pieces_of(text) for text in texts]
    flat = [piece for text_pieces in pieces for piece in text_pieces]
    encodings = iter(vocabulary.encode_batch_fast(flat, add_special_tokens=False))
    for text_pieces in pieces:
        ids = [np.array(next(encodings).ids, dtype=DTYPE) for _ in text_pieces]
        yield np.concatenate([*ids, np.array([tokenizer.EOS], dtype=DTYPE)])


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
        ends: dict[str, list[int]] = {split: [] for split in SPLITS}
        paths = {split: self.spec.folder / f"{split}_{rank:05d}.part" for split in SPLITS}
        files = {split: path.open("wb") for split, path in paths.items()}
        try:
            for batch in batches(data):
                self.stat_update("total", value=len(batch))
                for document, ids in zip(
                    batch, encode(vocabulary, [d.text for d in batch]), strict=True
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
            shuffle(paths[split], ends[split], order)


def shuffle(path: Path, ends: list[int], order: NDArray[np.int64]) -> None:
    """Rewrite a `.part` file as `.ds` and `.ds.index` with its documents in `order`.

    Writes no file if there are no documents.
    """
    if ends:
        tokens = np.memmap(path, dtype=DTYPE, mode="r")
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
    paths = [spec.folder / f"{split}_{rank:05d}.ds" for split in SPLITS]
    return [asdict(describe_shard(path)) for path in paths if path.is_file()]


def describe_shard(path: Path) -> ShardFile:
    """Counts and hash of a shard; asserts that it has one end token per document."""
    index = np.fromfile(path.with_name(path.name + ".index"), dtype="<u8")
    tokens = np.memmap(path, dtype=DTYPE, mode="r")
    assert len(tokens) == index[-1], f"{path} has {len(tokens)} tokens, its index says {index[-1]}"
    block = 2**24  # tokens compared at once
    ends = sum(
        int((tokens[i : i + block] == tokenizer.EOS).sum()) for i in range(0, len(tokens), block)
    )
    assert ends == len(index), f"{path} has {ends} end tokens for {len(index)} documents"
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
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer.train(train_texts(sources, heldout_percent, max_bytes), vocab_size, out)
