"""Tokens of a source's shards at any position, by memory map.

Opening costs one memory map per file; nothing in memory grows with the corpus.
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np

from data.stream.manifests import DTYPE, Manifest


class Shards:
    """The concatenated tokens of one split of a source, readable at any position."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        files = [file for file in manifest.splits[split] if file.tokens]
        self.starts = list(accumulate((file.tokens for file in files), initial=0))
        # as plain arrays over the same pages: a slice of a memmap costs microseconds of bookkeeping
        self.maps = [
            np.memmap(folder / file.name, dtype=DTYPE, mode="r").view(np.ndarray) for file in files
        ]
        self.tokens = self.starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64 [count], across file borders; the caller stays
        inside.
        """
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
            piece = self.maps[index][offset : offset + count - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1
