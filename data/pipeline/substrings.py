"""Exact substrings: cut every run of n or more tokens that occurred before in the source, as in
RefinedWeb.

Lee et al. 2022 (arXiv 2107.06499) find such runs with a suffix array; datatrove's bridge to it
overflows at 4 GiB. Here every window of n tokens gets a 64-bit hash. The hashes are sorted in runs
on disk and compared partition by partition, and every window but the first with its hash is cut. A
run of m >= n repeated tokens is m - n + 1 repeated windows, so both methods find the same runs. A
token is a word or a punctuation mark, which Falcon's tokenizer encodes as one token or more.

Costs for T tokens: 16 T bytes on disk during the passes; memory per process is the largest of about
100 bytes x CHUNK, six times a partition (PARTITION_BYTES at most) and 8 bytes per repeated window
of a task, so it does not grow with the corpus. Two different windows share a hash with probability
2^-64: T^2 / 2^65 windows are cut by mistake, for T = 4e12 one in 1e7.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from numpy.typing import NDArray

from core.files import make_folder, write_atomic
from data.pipeline.tasks import Documents, document_writer, run_task, set_exclusion_writers
from data.stream.mixture import splitmix64

REQUIRES = ("xxhash",)
VERSION = 1  # raise with the text that it cuts
PIECE = re.compile(r"\w+|[^\w\s]")  # a token
WINDOW = np.dtype([("hash", "<u8"), ("position", "<u8")])
CHUNK = 2**22  # windows sorted in memory at once
PARTITION_BYTES = 2**28
LEAST_CHARACTERS = 20  # RefinedWeb drops documents that are shorter after cutting (appendix G.3.2)
ODD = np.uint64(0x9E3779B97F4A7C15)
Hashes = NDArray[np.uint64]


def partitions_for(tokens: int) -> int:
    """Number of partitions, a power of two, such that each has at most about PARTITION_BYTES."""
    return 1 << max(0, (tokens * WINDOW.itemsize // PARTITION_BYTES).bit_length())


@lru_cache(maxsize=2**18)
def token_hash(token: str) -> int:
    """64-bit hash of a token."""
    return xxhash.xxh64_intdigest(token)


def window_hashes(tokens: list[str], n: int) -> Hashes:
    """Hash of every window of n tokens, uint64 [len(tokens) - n + 1]; lengths double up to n."""
    if len(tokens) < n:
        return np.empty(0, dtype=np.uint64)
    out = np.fromiter(map(token_hash, tokens), dtype=np.uint64, count=len(tokens))
    length = 1
    while length * 2 <= n:
        out = splitmix64(out[:-length] * ODD + out[length:])
        length *= 2
    if length < n:
        rest = n - length
        out = splitmix64(out[:-rest] * ODD + out[rest:])
    return out


class Windows(PipelineStep):
    """Writes the windows of one task's documents as sorted runs with partition offsets."""

    name = "Windows"
    type = "Substrings"

    def __init__(self, n: int, folder: Path, partitions: int, first_position: int = 0) -> None:
        super().__init__()
        self.n = n
        self.folder = folder
        self.partitions = partitions
        self.first_position = first_position

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Index the windows of all documents of the task."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f"{rank:05d}-*"):
            stale.unlink()
        buffer: list[NDArray[np.void]] = []
        num_buffered = 0
        run_number = 0
        position = self.first_position
        for document in data:
            self.stat_update("total")
            tokens = PIECE.findall(document.text)
            hashes = window_hashes(tokens, self.n)
            windows = np.empty(len(hashes), dtype=WINDOW)
            windows["hash"] = hashes
            windows["position"] = np.arange(position, position + len(hashes), dtype=np.uint64)
            buffer.append(windows)
            position += len(tokens)
            num_buffered += len(windows)
            if num_buffered >= CHUNK:
                self.write_run(rank, run_number, np.concatenate(buffer))
                buffer, num_buffered = [], 0
                run_number += 1
        if num_buffered:
            self.write_run(rank, run_number, np.concatenate(buffer))

    def write_run(self, rank: int, number: int, windows: NDArray[np.void]) -> None:
        """Write one run of windows sorted by hash."""
        windows = windows[np.argsort(windows["hash"], kind="stable")]
        bits = np.uint64(64 - (self.partitions.bit_length() - 1))
        partition = (
            np.zeros(len(windows), np.uint64) if self.partitions == 1 else windows["hash"] >> bits
        )
        offsets = np.searchsorted(
            partition, np.arange(self.partitions + 1, dtype=np.uint64)
        ).astype("<u8")
        offsets.tofile(self.folder / f"{rank:05d}-{number:05d}.borders")
        windows.tofile(self.folder / f"{rank:05d}-{number:05d}.windows")


def read_partition(path: Path, offsets: Path, index: int, dtype: np.dtype) -> np.ndarray:
    """Rows of one partition of a file."""
    start, end = np.fromfile(offsets, dtype="<u8", count=2, offset=8 * index)
    return np.fromfile(
        path, dtype=dtype, count=int(end - start), offset=int(start) * dtype.itemsize
    )


def index_windows(
    n: int, documents: Path, work: Path, partitions: int, rank: int, tasks: int
) -> None:
    """Pass 1, one task per file of documents."""
    steps = [Documents(documents), Windows(n, work / "windows", partitions)]
    run_task(steps, work / "logs" / "windows", rank, tasks)


def find_repeats(work: Path, partition: int, tasks: int) -> None:
    """Pass 2, one task per partition: positions of every window but the first of each hash."""
    out = work / "repeats"
    make_folder(out)
    paths = sorted((work / "windows").glob("*.windows"))
    runs = [read_partition(path, path.with_suffix(".borders"), partition, WINDOW) for path in paths]
    windows = np.concatenate([np.empty(0, dtype=WINDOW), *runs])
    run_tasks = [
        np.full(len(run), int(path.name[:5]), np.int64)
        for path, run in zip(paths, runs, strict=True)
    ]
    task = np.concatenate([np.empty(0, np.int64), *run_tasks])
    # stable: windows of equal hash stay in the order of tasks and positions
    order = np.argsort(windows["hash"], kind="stable")
    windows, task = windows[order], task[order]
    repeated = np.zeros(len(windows), dtype=bool)
    repeated[1:] = windows["hash"][1:] == windows["hash"][:-1]
    positions, task = windows["position"][repeated], task[repeated]
    order = np.lexsort((positions, task))
    offsets = np.searchsorted(task[order], np.arange(tasks + 1)).astype("<u8")
    write_atomic(out / f"{partition:06d}.places", positions[order].tofile)
    write_atomic(out / f"{partition:06d}.borders", offsets.tofile)  # marks the task as complete


def repeats_task(work: Path, partition: int, tasks: int) -> None:
    """Run find_repeats, unless it is complete."""
    if not (work / "repeats" / f"{partition:06d}.borders").is_file():
        find_repeats(work, partition, tasks)


def spans(positions: NDArray[np.int64], n: int) -> Iterator[tuple[int, int]]:
    """Unions [start, end) of the windows of n tokens at sorted `positions`."""
    if not len(positions):
        return
    gaps = np.flatnonzero(np.diff(positions) > n)
    first = positions[np.r_[0, gaps + 1]]
    last = positions[np.r_[gaps, len(positions) - 1]]
    yield from zip(first.tolist(), (last + n).tolist(), strict=True)


def cut_windows(text: str, positions: NDArray[np.int64], n: int) -> str:
    """Remove the windows of n tokens at sorted token `positions` from a text.

    White space after a cut is removed only if white space remains before it, so that no two words
    are joined.
    """
    tokens = list(PIECE.finditer(text))
    token_starts = [token.start() for token in tokens] + [len(text)]
    remaining: list[str] = []
    offset = 0
    for start, end in spans(positions, n):
        cut = token_starts[start]
        remaining.append(text[offset:cut])
        after_space = cut == 0 or text[cut - 1].isspace()
        offset = token_starts[end] if after_space else tokens[end - 1].end()
    return "".join([*remaining, text[offset:]])


class Cut(BaseFilter):
    """Cuts repeated runs out of documents, and drops documents with too little text left."""

    name = "Exact substrings"

    def __init__(self, n: int, work: Path, partitions: int) -> None:
        super().__init__()
        self.n = n
        self.work = work
        self.partitions = partitions

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Read the positions of this task's repeats, then filter as usual."""
        files = [self.work / "repeats" / f"{p:06d}.places" for p in range(self.partitions)]
        positions = [
            read_partition(file, file.with_suffix(".borders"), rank, np.dtype("<u8"))
            for file in files
        ]
        self.positions = np.sort(np.concatenate(positions)).astype(np.int64)
        self.next_position = 0  # of the next document's first token
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Cut the document's text in place; returns True, or (False, reason) to drop it."""
        start = self.next_position
        self.next_position += len(PIECE.findall(doc.text))
        low, high = np.searchsorted(self.positions, (start, self.next_position))
        if low == high:
            return True
        text = cut_windows(doc.text, self.positions[low:high] - start, self.n).strip()
        self.stat_update("cut_documents")
        self.stat_update("cut_characters", value=len(doc.text) - len(text))
        if len(text) < LEAST_CHARACTERS:
            return False, "repeated"
        doc.text = text
        return True


def cut_repeats(
    n: int,
    documents: Path,
    work: Path,
    partitions: int,
    out: Path,
    excluded: Path | None,
    rank: int,
    tasks: int,
) -> None:
    """Pass 3, one task per file of documents: write the remaining text to `out`."""
    steps = [Documents(documents), Cut(n, work, partitions)]
    if excluded is not None:
        set_exclusion_writers(excluded, steps)
    run_task([*steps, document_writer(out)], work / "logs" / "cut", rank, tasks)
