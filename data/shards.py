"""Token shards on disk: memory-mapped reading and the manifest that pins them.

A source is a folder `<data.folder>/shards/<source>/` with `manifest.json` and, per split ("train", "heldout"),
datatrove `.ds` files: little-endian uint16 token ids, no header, every document ended by eos.
Opening costs one small JSON file and one memory map per file; nothing in memory grows with the corpus.
"""

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from core.errors import InputError
from core.files import write_json

MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
DTYPE = np.dtype("<u2")


@dataclass
class ShardFile:
    """One `.ds` file, named relative to the folder of its source."""

    name: str
    tokens: int
    documents: int
    sha256: str


@dataclass
class Manifest:
    """What a source's shards are and where they come from."""

    source: str
    licence: str
    recipe: str
    recipe_sha256: str  # of its version and settings, so that a changed recipe is seen
    tokenizer_sha256: str
    eos: int
    vocab_size: int  # rows that an embedding needs: the highest id of the vocabulary and one
    splits: dict[str, list[ShardFile]]

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(file.tokens for file in self.splits[split])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into place."""
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of one source.

    Raises InputError when it is absent, when a file lies outside the folder, is missing or has another size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"no shards at {folder}: build them with `python data/prepare.py` and the same overrides")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        splits = {split: [ShardFile(**file) for file in raw["splits"][split]] for split in SPLITS}
        manifest = Manifest(**{**raw, "splits": splits})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a manifest ({error}); remove {folder} and prepare the data again") from error
    for file in (file for split in splits.values() for file in split):
        check_file(folder, file)
    return manifest


def check_file(folder: Path, file: ShardFile) -> None:
    """Refuse a shard that leaves its folder, is missing or has another length than the manifest says."""
    path = folder / file.name
    if folder.resolve() not in path.resolve().parents:
        raise InputError(f"{folder / MANIFEST} names {file.name}, which lies outside its folder")
    size = path.stat().st_size if path.is_file() else -1
    if size != file.tokens * DTYPE.itemsize:
        state = "is missing" if size < 0 else f"has {size} bytes instead of {file.tokens * DTYPE.itemsize}"
        raise InputError(f"shard {path} {state}; remove {folder} and prepare the data again")


class Shards:
    """The concatenated tokens of one split of a source, readable at any position."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        files = [file for file in manifest.splits[split] if file.tokens]
        self.starts = list(accumulate((file.tokens for file in files), initial=0))
        # as plain arrays over the same pages: a slice of a memmap costs microseconds of bookkeeping
        self.maps = [np.memmap(folder / file.name, dtype=DTYPE, mode="r").view(np.ndarray) for file in files]
        self.tokens = self.starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64 [count], across file borders; the caller stays inside."""
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
