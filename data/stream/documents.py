"""Single documents of a source's shards, by number: for looking at data, not for training."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from data.stream.manifests import DTYPE, Manifest, ShardFile


def document_ends(folder: Path, file: ShardFile) -> NDArray[np.uint64]:
    """Ends of a shard's documents in tokens [documents], a memory map; InputError if wrong."""
    path = folder / (file.name + ".index")
    ends: NDArray[np.uint64] = (
        np.memmap(path, dtype="<u8", mode="r")
        if path.is_file() and file.documents
        else np.empty(0, np.uint64)
    )
    if len(ends) != file.documents or (file.documents and ends[-1] != file.tokens):
        raise InputError(f"{path} is not the index of {file.name}; prepare the source again")
    return ends


class Documents:
    """The documents of one split in the order of its files."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self.folder = folder
        self.files = [file for file in manifest.splits[split] if file.documents]
        self.firsts = np.cumsum([0] + [file.documents for file in self.files])
        self.count = int(self.firsts[-1])

    def ids(self, number: int) -> NDArray[np.int64]:
        """Ids of a document, its end token last."""
        assert 0 <= number < self.count, (number, self.count)
        place = int(np.searchsorted(self.firsts, number, side="right")) - 1
        file, inside = self.files[place], number - int(self.firsts[place])
        ends = document_ends(self.folder, file)
        start = int(ends[inside - 1]) if inside else 0
        tokens = np.memmap(self.folder / file.name, dtype=DTYPE, mode="r")
        return np.asarray(tokens[start : int(ends[inside])], dtype=np.int64)
