"""Random access to the tokens of a source's shards through memory maps.

A file is mapped when its first token is read, so opening is free and a rank maps only what it
reads.
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from data.stream.manifests import Manifest


class Shards:
    """The concatenated tokens of one split of a source, readable at any position."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self.folder = folder
        self.dtype = manifest.dtype
        self.vocab_size = manifest.vocab_size
        self.files = [file for file in manifest.splits[split] if file.tokens]
        self.starts = list(accumulate((file.tokens for file in self.files), initial=0))
        self.maps: list[NDArray[np.unsignedinteger] | None] = [None] * len(self.files)
        self.tokens = self.starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count) as int64 [count]; the range must be in bounds."""
        out = np.empty(count, dtype=np.int64)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill `out`, int64 [count], with the tokens [start, start + count).

        Raises InputError for an id outside the vocabulary, which would have no embedding.
        """
        count = len(out)
        assert start >= 0 and start + count <= self.tokens, (start, count, self.tokens)
        file_index = bisect_right(self.starts, start) - 1
        filled = 0
        while filled < count:
            offset = start + filled - self.starts[file_index]
            tokens = self.maps[file_index]
            if tokens is None:
                tokens = self._map(file_index)
            values = tokens[offset : offset + count - filled]
            if values.max() >= self.vocab_size:
                self._report(file_index, offset, values)
            out[filled : filled + len(values)] = values
            filled += len(values)
            file_index += 1

    def _report(self, file_index: int, offset: int, values: NDArray[np.unsignedinteger]) -> None:
        """Raise InputError for the first id outside the vocabulary."""
        index = int(np.argmax(values >= self.vocab_size))
        raise InputError(
            f"shard {self.folder / self.files[file_index].name} has id {values[index]} at token "
            f"{offset + index}, its vocabulary has {self.vocab_size:,}: prepare the data again"
        )

    def _map(self, file_index: int) -> NDArray[np.unsignedinteger]:
        """Map a file; raises InputError if it is shorter than its manifest says."""
        file = self.files[file_index]
        path = self.folder / file.name
        try:
            memmap = np.memmap(path, dtype=self.dtype, mode="r", shape=(file.tokens,))
        except (OSError, ValueError) as error:
            raise InputError(f"shard {path} cannot be read ({error}): restore it") from error
        # A plain array over the same pages: slicing a memmap costs microseconds of bookkeeping.
        tokens = self.maps[file_index] = memmap.view(np.ndarray)
        return tokens
