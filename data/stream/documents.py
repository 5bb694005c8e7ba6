"""Documents of a source's shards by index: for looking at data, not for training."""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from data.stream.manifests import Manifest, ShardFile


def document_ends(folder: Path, file: ShardFile) -> NDArray[np.uint64]:
    """Memory-map the end of every document of a shard, in tokens [documents].

    Raises InputError if the index is missing or does not match the shard.
    """
    path = folder / (file.name + ".index")
    ends: NDArray[np.uint64] = np.empty(0, np.uint64)
    with suppress(ValueError):  # of an empty file, or one that was cut within a number
        if path.is_file() and file.documents:
            ends = np.memmap(path, dtype="<u8", mode="r")
    if len(ends) != file.documents or (file.documents and ends[-1] != file.tokens):
        raise InputError(f"{path} is not the index of {file.name}; prepare the source again")
    return ends


def read_clean(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of clean documents, each with its `text`.

    Raises InputError if the file is damaged.
    """
    try:
        with gzip.open(path) as lines:
            for line in lines:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError("a row has no text")
                yield row
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error}): remove {path.parent} and prepare the data again"
        ) from error


class Documents:
    """The documents of one split, in the order of its files."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self.folder = folder
        self.dtype = manifest.dtype
        self.files = [file for file in manifest.splits[split] if file.documents]
        # index of each file's first document, and the total
        self.offsets = np.cumsum([0] + [file.documents for file in self.files])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def ids(self, index: int) -> NDArray[np.int64]:
        """Token ids of a document, including its end token."""
        assert 0 <= index < len(self), (index, len(self))
        file_index = int(np.searchsorted(self.offsets, index, side="right")) - 1
        file = self.files[file_index]
        index_in_file = index - int(self.offsets[file_index])
        ends = document_ends(self.folder, file)
        start = int(ends[index_in_file - 1]) if index_in_file else 0
        tokens = np.memmap(self.folder / file.name, dtype=self.dtype, mode="r")
        return np.asarray(tokens[start : int(ends[index_in_file])], dtype=np.int64)
