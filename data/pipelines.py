"""The two pipelines of every source, raw -> clean and clean -> shards, cut into tasks that run one by one.

A task is the unit of resuming: it either ended, and datatrove's completion mark says so, or is run again from its start
and overwrites what it left. Everything here runs in a worker process.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.stats import PipelineStats

from data import recipes, tokenizer
from data.config import Source
from data.recipes.readers import Jsonl
from data.shards import DTYPE, ShardFile, sha256_of

HASH_BUCKETS = 1_000_000


@dataclass
class Clean:
    """A finished folder of clean documents."""

    folder: Path
    files: list[str]  # no other file of the folder is ever read
    documents: int


@dataclass
class Sharding:
    """How clean documents become the shards of a source."""

    clean: Clean
    folder: Path  # under construction
    vocabulary: Path  # tokenizer.json
    seed: int  # of the order of documents inside a shard
    heldout_percent: float
    tasks: int


class OneTask(LocalPipelineExecutor):
    """A single task in this process: the pool of data.workers takes the place of datatrove's, with its manager."""

    def run(self) -> PipelineStats:
        """Statistics of the task, empty when it was completed before."""
        return self._run_for_rank(self.local_rank_offset, local_rank=1)  # other than 0: errors only on the terminal


def run_task(pipeline: list[PipelineStep], logs: Path, rank: int, tasks: int) -> None:
    """Run task `rank` of `tasks` of a pipeline, unless `logs` says that it is complete."""
    OneTask(pipeline, tasks=tasks, local_tasks=1, local_rank_offset=rank, logging_dir=str(logs)).run()


def row_of(self: JsonlWriter, document: Document) -> dict[str, Any]:
    """A clean document on disk: text, id and the group that decides its split.

    Without a group of its own a document is its own group, by its text: copies stay on one side of the split.
    """
    group = document.metadata.get("group") or hashlib.sha256(document.text.encode()).hexdigest()
    return {"text": document.text, "id": document.id, "group": str(group)}


def clean_task(source: Source, folder: Path, rank: int) -> None:
    """Clean one task's share of a source into `folder`/<rank>.jsonl.gz."""
    steps = recipes.load(source.recipe).steps(source, folder)
    run_task([*steps, JsonlWriter(str(folder), adapter=row_of)], folder / "datatrove", rank, source.tasks)


def split_of(group: str, heldout_percent: float) -> str:
    """ "train" or "heldout"; depends on the group alone, so no new document moves an old one across."""
    bucket = int(hashlib.sha256(f"heldout:{group}".encode()).hexdigest(), 16) % HASH_BUCKETS
    return "heldout" if bucket < heldout_percent / 100 * HASH_BUCKETS else "train"


class OnlySplit(BaseFilter):
    """Keeps the documents of one split."""

    name = "Split"

    def __init__(self, split: str, heldout_percent: float) -> None:
        super().__init__()
        self.split = split
        self.heldout_percent = heldout_percent

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        return split_of(doc.metadata["group"], self.heldout_percent) == self.split or (False, "other_split")


def reader_of(clean: Clean) -> Jsonl:
    """A reader of the clean documents, of the listed files only."""
    reader = Jsonl(str(clean.folder))
    reader.files = clean.files
    return reader


def shard_task(job: Sharding, split: str, rank: int) -> ShardFile | None:
    """Tokenize one task's share of a split; None when no document fell into it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
    writer = DocumentTokenizer(
        str(job.folder),
        str(job.vocabulary),
        save_filename=split,
        eos_token=tokenizer.EOS_TOKEN,
        save_final_metadata=False,  # holds this machine's path of the vocabulary
        batch_size=256,  # documents held in memory at once; 10,000 long ones would not fit
        seed=job.seed,  # datatrove's default is a new order every time
    )
    # Text that spells <|endoftext|> must not end its document.
    writer.tokenizer.encode_special_tokens = True
    pipeline = [reader_of(job.clean), OnlySplit(split, job.heldout_percent), writer]
    run_task(pipeline, job.folder / f"datatrove-{split}", rank, job.tasks)
    for leftover in job.folder.glob(f"{split}_{rank:05d}_unshuffled.ds*"):
        leftover.unlink()  # of a task without documents
    path = job.folder / f"{split}_{rank:05d}_00000_doc_shuffled.ds"
    return describe(path) if path.is_file() else None


def describe(path: Path) -> ShardFile:
    """Sizes and hash of a shard; asserts that it has one end token per document."""
    index = np.fromfile(path.with_name(path.name + ".index"), dtype="<u8")
    tokens = np.memmap(path, dtype=DTYPE, mode="r")
    assert len(tokens) == index[-1], f"{path} has {len(tokens)} tokens, its index says {index[-1]}"
    piece = 2**24
    ends = sum(int((tokens[i : i + piece] == tokenizer.EOS).sum()) for i in range(0, len(tokens), piece))
    assert ends == len(index), f"{path} has {ends} end tokens for {len(index)} documents"
    return ShardFile(path.name, len(tokens), len(index), sha256_of(path))


def train_texts(cleans: list[Clean], heldout_percent: float, max_bytes: int) -> Iterator[str]:
    """Training documents of all sources by turns, always of the one least read, up to `max_bytes` of text."""
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


def tokenizer_task(cleans: list[Clean], heldout_percent: float, max_bytes: int, vocab_size: int, out: Path) -> None:
    """Train the vocabulary on the sources' training documents into the folder `out`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer.train(train_texts(cleans, heldout_percent, max_bytes), vocab_size, out)
