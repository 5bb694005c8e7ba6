"""Tokens of a source's shards at any position, by memory map.

A file is mapped when its first token is read: opening costs nothing, and a rank maps what it reads.
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.stream.manifests import DTYPE, Manifest


class Shards:
    """The concatenated tokens of one split of a source, readable at any position."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        files = [file for file in manifest.splits[split] if file.tokens]
        self.folder, self.files = folder, files
        self.starts = list(accumulate((file.tokens for file in files), initial=0))
        self.maps: list[NDArray[np.uint16] | None] = [None] * len(files)
        self.tokens = self.starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64 [count], across files; the caller stays inside."""
        out = np.empty(count, dtype=np.int64)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill an int64 [count] with the tokens [start, start + count)."""
        count, filled = len(out), 0
        assert start >= 0 and start + count <= self.tokens, (start, count, self.tokens)
        index = bisect_right(self.starts, start) - 1
        while filled < count:
            offset = start + filled - self.starts[index]
            tokens = self.maps[index]
            piece = (self._map(index) if tokens is None else tokens)[
                offset : offset + count - filled
            ]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1

    def _map(self, index: int) -> NDArray[np.uint16]:
        """Map a file; raises ValueError when it is shorter than its manifest says."""
        file = self.files[index]
        tokens = np.memmap(self.folder / file.name, dtype=DTYPE, mode="r", shape=(file.tokens,))
        # a plain array over the same pages: a slice of a memmap costs microseconds of bookkeeping
        plain = self.maps[index] = tokens.view(np.ndarray)
        return plain
