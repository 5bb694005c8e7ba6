"""Exact substrings: a run of n or more tokens that occurred before in the source is cut out, as in
RefinedWeb.

Lee et al. 2022 (arXiv 2107.06499) find such runs with a suffix array; datatrove's bridge to it
overflows at 4 GiB. Here every window of n tokens gets a 64-bit hash; the hashes are sorted in runs
on disk, compared partition by partition, and every window but the first of its kind is cut. A run
of m >= n repeated tokens is m - n + 1 repeated windows, so both find the same runs. A token is a
word or a mark, which Falcon's vocabulary writes in one token or more.

Costs, for T tokens: 16 T bytes on disk while it runs; per process about 100 bytes x CHUNK, or six
times a partition (PARTITION_BYTES at most), or 8 bytes per repeated window of a task: nothing in
memory grows with the corpus. Two different windows share a hash with probability 2^-64: T^2 / 2^65
windows are cut wrongly, at T = 4e12 one in 1e7.
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

from core.files import write_atomic
from data.pipeline.tasks import Documents, exclude_into, run_task, write_documents
from data.stream.mixture import splitmix64

REQUIRES = ("xxhash",)
VERSION = 1  # raised with what it cuts
PIECE = re.compile(r"\w+|[^\w\s]")
WINDOW = np.dtype([("hash", "<u8"), ("place", "<u8")])
CHUNK = 2**22  # windows that are sorted in memory at once
PARTITION_BYTES = 2**28
LEAST_CHARACTERS = 20  # what is left of a document; RefinedWeb drops shorter ones (appendix G.3.2)
ODD = np.uint64(0x9E3779B97F4A7C15)
Hashes = NDArray[np.uint64]


def partitions_for(tokens: int) -> int:
    """A power of two of partitions, each of about PARTITION_BYTES or less."""
    return 1 << max(0, (tokens * WINDOW.itemsize // PARTITION_BYTES).bit_length())


@lru_cache(maxsize=2**18)
def piece_hash(piece: str) -> int:
    """64-bit hash of a token."""
    return xxhash.xxh64_intdigest(piece)


def window_hashes(pieces: list[str], n: int) -> Hashes:
    """Hash of every window of n tokens, [len(pieces) - n + 1]; window lengths double up to n."""
    if len(pieces) < n:
        return np.empty(0, dtype=np.uint64)
    out = np.fromiter(map(piece_hash, pieces), dtype=np.uint64, count=len(pieces))
    length = 1
    while length * 2 <= n:
        out = splitmix64(out[:-length] * ODD + out[length:])
        length *= 2
    if length < n:
        rest = n - length
        out = splitmix64(out[:-rest] * ODD + out[rest:])
    return out


class Windows(PipelineStep):
    """Writes the windows of one task's documents as sorted runs, with every partition's borders."""

    name = "Windows"
    type = "Substrings"

    def __init__(self, n: int, folder: Path, partitions: int, first_place: int = 0) -> None:
        super().__init__()
        self.n = n
        self.folder = folder
        self.partitions = partitions
        self.first_place = first_place

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Consume the documents."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f"{rank:05d}-*"):
            stale.unlink()
        parts: list[NDArray[np.void]] = []
        place, held, number = self.first_place, 0, 0
        for document in data:
            self.stat_update("total")
            pieces = PIECE.findall(document.text)
            hashes = window_hashes(pieces, self.n)
            windows = np.empty(len(hashes), dtype=WINDOW)
            windows["hash"] = hashes
            windows["place"] = np.arange(place, place + len(hashes), dtype=np.uint64)
            parts.append(windows)
            place += len(pieces)
            held += len(windows)
            if held >= CHUNK:
                self.write(rank, number, np.concatenate(parts))
                parts, held, number = [], 0, number + 1
        if held:
            self.write(rank, number, np.concatenate(parts))

    def write(self, rank: int, number: int, windows: NDArray[np.void]) -> None:
        """One sorted run."""
        windows = windows[np.argsort(windows["hash"], kind="stable")]
        bits = np.uint64(64 - (self.partitions.bit_length() - 1))
        partition = (
            np.zeros(len(windows), np.uint64) if self.partitions == 1 else windows["hash"] >> bits
        )
        borders = np.searchsorted(
            partition, np.arange(self.partitions + 1, dtype=np.uint64)
        ).astype("<u8")
        borders.tofile(self.folder / f"{rank:05d}-{number:05d}.borders")
        windows.tofile(self.folder / f"{rank:05d}-{number:05d}.windows")


def part_of(path: Path, borders: Path, index: int, dtype: np.dtype) -> np.ndarray:
    """Rows of one partition of a file."""
    low, high = np.fromfile(borders, dtype="<u8", count=2, offset=8 * index)
    return np.fromfile(path, dtype=dtype, count=int(high - low), offset=int(low) * dtype.itemsize)


def index_windows(
    n: int, documents: Path, work: Path, partitions: int, rank: int, tasks: int
) -> None:
    """Pass 1, one task per file of documents."""
    steps = [Documents(documents), Windows(n, work / "windows", partitions)]
    run_task(steps, work / "logs" / "windows", rank, tasks)


def find_repeats(work: Path, partition: int, tasks: int) -> None:
    """Pass 2, one task per partition: places of all windows but the first of each hash, by task."""
    out = work / "repeats"
    out.mkdir(exist_ok=True)
    runs = sorted((work / "windows").glob("*.windows"))
    parts = [part_of(path, path.with_suffix(".borders"), partition, WINDOW) for path in runs]
    windows = np.concatenate([np.empty(0, dtype=WINDOW), *parts])
    owners = [
        np.full(len(part), int(path.name[:5]), np.int64)
        for path, part in zip(runs, parts, strict=True)
    ]
    task = np.concatenate([np.empty(0, np.int64), *owners])
    order = np.argsort(windows["hash"], kind="stable")  # ties stay in the order of tasks and places
    windows, task = windows[order], task[order]
    again = np.zeros(len(windows), dtype=bool)
    again[1:] = windows["hash"][1:] == windows["hash"][:-1]
    place, task = windows["place"][again], task[again]
    order = np.lexsort((place, task))
    borders = np.searchsorted(task[order], np.arange(tasks + 1)).astype("<u8")
    place[order].tofile(out / f"{partition:06d}.places")
    write_atomic(out / f"{partition:06d}.borders", borders.tofile)  # the mark of completion


def repeats_task(work: Path, partition: int, tasks: int) -> None:
    """find_repeats, unless it was done before."""
    if not (work / "repeats" / f"{partition:06d}.borders").is_file():
        find_repeats(work, partition, tasks)


def spans(places: NDArray[np.int64], n: int) -> Iterator[tuple[int, int]]:
    """Unions [first, past) of the windows that begin at sorted `places`."""
    if not len(places):
        return
    gaps = np.flatnonzero(np.diff(places) > n)
    firsts, lasts = places[np.r_[0, gaps + 1]], places[np.r_[gaps, len(places) - 1]]
    yield from zip(firsts.tolist(), (lasts + n).tolist(), strict=True)


def cut(text: str, places: NDArray[np.int64], n: int) -> str:
    """The text without the windows of n tokens that begin at token numbers `places`; all else stays
    as it was.

    White space after a cut goes only where white space is left before it, so that no two words are
    joined.
    """
    matches = list(PIECE.finditer(text))
    starts = [match.start() for match in matches] + [len(text)]
    kept, end = [], 0
    for first, past in spans(places, n):
        kept.append(text[end : starts[first]])
        spaced = starts[first] == 0 or text[starts[first] - 1].isspace()
        end = starts[past] if spaced else matches[past - 1].end()
    return "".join([*kept, text[end:]])


class Cut(BaseFilter):
    """Cuts repeated runs out of documents, and drops those of which next to nothing is left."""

    name = "Exact substrings"

    def __init__(self, n: int, work: Path, partitions: int) -> None:
        super().__init__()
        self.n = n
        self.work = work
        self.partitions = partitions

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """As every filter, with this task's repeats at hand."""
        files = [self.work / "repeats" / f"{p:06d}.places" for p in range(self.partitions)]
        parts = [
            part_of(file, file.with_suffix(".borders"), rank, np.dtype("<u8")) for file in files
        ]
        self.places = np.sort(np.concatenate(parts)).astype(np.int64)
        self.next_place = 0
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True with the text cut in place, or (False, reason)."""
        first = self.next_place
        self.next_place += len(PIECE.findall(doc.text))
        low, high = np.searchsorted(self.places, (first, self.next_place))
        if low == high:
            return True
        shorter = cut(doc.text, self.places[low:high] - first, self.n).strip()
        self.stat_update("cut_documents")
        self.stat_update("cut_characters", value=len(doc.text) - len(shorter))
        if len(shorter) < LEAST_CHARACTERS:
            return False, "repeated"
        doc.text = shorter
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
    """Pass 3, one task per file of documents: write what stays to `out`."""
    steps = [Documents(documents), Cut(n, work, partitions)]
    if excluded is not None:
        exclude_into(excluded, steps)
    run_task([*steps, write_documents(out)], work / "logs" / "cut", rank, tasks)
