"""Turn clean documents into a source's token shards, and into the text that trains a vocabulary."""

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
from data.pipeline.accounting import Step
from data.pipeline.tasks import run_task
from data.recipes.readers import Jsonl
from data.stream.manifests import DTYPE, SPLITS, ShardFile

VERSION = 1  # raised with the split, the order inside a shard, or what is tokenized
HASH_BUCKETS = 1_000_000
# text that is tokenized at once: memory stays flat whatever the documents' length
BATCH_BYTES = 2**21
PIECE_CHARACTERS = 2**20  # the tokenizer is slow on longer texts


@dataclass
class Clean:
    """A finished folder of clean documents."""

    folder: Path
    files: list[str]  # no other file of the folder is ever read
    steps: list[Step]  # what became of every document of the input

    @property
    def documents(self) -> int:
        """Number of documents that were kept."""
        return self.steps[-1].forwarded


@dataclass
class Sharding:
    """How clean documents become the shards of a source."""

    clean: Clean
    folder: Path  # under construction
    vocabulary: Path  # tokenizer.json
    seed: int  # of the order of documents inside a shard
    heldout_percent: float
    tasks: int


def split_of(group: str, heldout_percent: float) -> str:
    """Split, "train" or "heldout"; depends only on the group, so new documents move no old ones."""
    bucket = int(hashlib.sha256(f"heldout:{group}".encode()).hexdigest(), 16) % HASH_BUCKETS
    return "heldout" if bucket < heldout_percent / 100 * HASH_BUCKETS else "train"


def reader_of(clean: Clean) -> Jsonl:
    """A reader of the clean documents, of the listed files only."""
    reader = Jsonl(str(clean.folder))
    reader.files = clean.files
    return reader


def pieces_of(text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """A long text in pieces that tokenize to the same ids: each begins at a line break between two
    visible characters.

    A text without such a place is left in one piece.
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


def batches(documents: Iterable[Document], size: int = BATCH_BYTES) -> Iterator[list[Document]]:
    """Lists of documents of about `size` bytes of text together."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def encode(vocabulary: Tokenizer, texts: list[str]) -> Iterator[NDArray[np.uint16]]:
    """Ids of every text, with the end token; <|endoftext|> in a text does not end its document."""
    pieces = [pieces_of(text) for text in texts]
    flat = [piece for parts in pieces for piece in parts]
    encodings = iter(vocabulary.encode_batch_fast(flat, add_special_tokens=False))
    for parts in pieces:
        ids = [np.array(next(encodings).ids, dtype=DTYPE) for _ in parts]
        yield np.concatenate([*ids, np.array([tokenizer.EOS], dtype=DTYPE)])


class TokenWriter(PipelineStep):
    """Tokenizes the documents of a task into one file per split, then puts each file's documents
    into a seeded order.

    The files are datatrove's: `.ds` holds the ids, `.ds.index` the end of every document in tokens,
    uint64.
    """

    name = "Tokens"
    type = "Writer"

    def __init__(self, job: Sharding) -> None:
        super().__init__()
        self.job = job

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Consume the documents."""
        vocabulary = tokenizer.load(self.job.vocabulary)
        vocabulary.encode_special_tokens = True
        ends: dict[str, list[int]] = {split: [] for split in SPLITS}
        paths = {split: self.job.folder / f"{split}_{rank:05d}.part" for split in SPLITS}
        files = {split: path.open("wb") for split, path in paths.items()}
        try:
            for batch in batches(data):
                self.stat_update("total", value=len(batch))
                for document, ids in zip(
                    batch, encode(vocabulary, [d.text for d in batch]), strict=True
                ):
                    split = split_of(document.metadata["group"], self.job.heldout_percent)
                    files[split].write(ids.data)
                    ends[split].append((ends[split][-1] if ends[split] else 0) + len(ids))
        finally:
            for file in files.values():
                file.close()
        for number, split in enumerate(SPLITS):
            order = np.random.default_rng([self.job.seed, rank, number]).permutation(
                len(ends[split])
            )
            shuffle(paths[split], ends[split], order)


def shuffle(path: Path, ends: list[int], order: NDArray[np.int64]) -> None:
    """Write a `.part`'s documents in `order` as `.ds` and `.ds.index`; none without documents."""
    if ends:
        tokens = np.memmap(path, dtype=DTYPE, mode="r")
        starts = np.array([0, *ends[:-1]], dtype=np.int64)
        lengths = np.array(ends, dtype=np.int64) - starts
        with path.with_suffix(".ds").open("wb", buffering=2**20) as file:
            for document in order:
                file.write(tokens[starts[document] : starts[document] + lengths[document]].data)
        np.cumsum(lengths[order]).astype("<u8").tofile(path.with_suffix(".ds.index"))
    path.unlink()


def shard_task(job: Sharding, rank: int) -> list[dict[str, Any]]:
    """Tokenize one task's share; returns non-empty splits' ShardFiles as plain values."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
    run_task([reader_of(job.clean), TokenWriter(job)], job.folder / "logs", rank, job.tasks)
    paths = [job.folder / f"{split}_{rank:05d}.ds" for split in SPLITS]
    return [asdict(describe(path)) for path in paths if path.is_file()]


def describe(path: Path) -> ShardFile:
    """Sizes and hash of a shard; asserts that it has one end token per document."""
    index = np.fromfile(path.with_name(path.name + ".index"), dtype="<u8")
    tokens = np.memmap(path, dtype=DTYPE, mode="r")
    assert len(tokens) == index[-1], f"{path} has {len(tokens)} tokens, its index says {index[-1]}"
    piece = 2**24
    ends = sum(
        int((tokens[i : i + piece] == tokenizer.EOS).sum()) for i in range(0, len(tokens), piece)
    )
    assert ends == len(index), f"{path} has {ends} end tokens for {len(index)} documents"
    return ShardFile(path.name, len(tokens), len(index), sha256_of(path))


def train_texts(cleans: list[Clean], heldout_percent: float, max_bytes: int) -> Iterator[str]:
    """Training documents up to `max_bytes` of text, always from the source least read so far."""
    streams = {place: reader_of(clean).run() for place, clean in enumerate(cleans)}
    read = dict.fromkeys(streams, 0)
    while streams and sum(read.values()) < max_bytes:
        place = min(streams, key=lambda place: (read[place], place))
        document = next(streams[place], None)
        if document is None:
            del streams[place]
        elif split_of(document.metadata["group"], heldout_percent) == "train":
            read[place] += len(document.text.encode())
            yield document.text


def tokenizer_task(
    cleans: list[Clean], heldout_percent: float, max_bytes: int, vocab_size: int, out: Path
) -> None:
    """Train the vocabulary on the sources' training documents into the folder `out`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer.train(train_texts(cleans, heldout_percent, max_bytes), vocab_size, out)
