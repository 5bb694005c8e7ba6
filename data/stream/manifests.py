"""What the shards of a source are: the manifest that pins them, written and checked.

A source is a folder `<data.folder>/shards/<source>/` with `manifest.json` and, per split ("train",
"heldout"), datatrove `.ds` files: little-endian uint16 token ids, no header, every document ended
by eos.
"""

import json
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import InputError
from core.files import sha256_of, write_json
from data.config import DataConfig

MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
DTYPE = np.dtype("<u2")  # of a token id


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
    # of what tokenized and split; none before 0.2
    versions: dict[str, str | int] = field(default_factory=dict)

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(file.tokens for file in self.splits[split])

    def files(self) -> list[ShardFile]:
        """The files of all splits."""
        return [file for split in self.splits.values() for file in split]


def parse_manifest(raw: dict[str, Any]) -> Manifest:
    """A manifest from its JSON object; raises KeyError, TypeError or ValueError for any other."""
    splits = {split: [ShardFile(**file) for file in raw["splits"][split]] for split in SPLITS}
    return Manifest(**{**raw, "splits": splits})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into place."""
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of one source.

    Raises InputError when it is absent, when a file lies outside the folder, is missing or has
    another size.
    """
    path = folder / MANIFEST
    require_shards(folder)
    try:
        manifest = parse_manifest(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not a manifest ({error}); remove {folder} and prepare the data again"
        ) from error
    for file in manifest.files():
        check_file(folder, file)
    return manifest


def check_file(folder: Path, file: ShardFile) -> None:
    """Refuse a shard that leaves its folder, is missing or has another length than the manifest
    says.

    Asks the file system once about a regular file directly in the folder, as all of ours are.
    """
    path, size = folder / file.name, -1
    with suppress(OSError):
        found = path.lstat()
        size = found.st_size if stat.S_ISREG(found.st_mode) else -1
    if size < 0 or path.parent != folder:
        if folder.resolve() not in path.resolve().parents:
            raise InputError(
                f"{folder / MANIFEST} names {file.name}, which lies outside its folder"
            )
        size = path.stat().st_size if path.is_file() else -1
    if size != file.tokens * DTYPE.itemsize:
        state = (
            "is missing"
            if size < 0
            else f"has {size} bytes instead of {file.tokens * DTYPE.itemsize}"
        )
        raise InputError(f"shard {path} {state}; remove {folder} and prepare the data again")


def tokenizer_path(config: DataConfig) -> Path:
    """Where the vocabulary of the shards lies."""
    return Path(config.folder) / "tokenizer" / "tokenizer.json"


def source_folder(config: DataConfig, source: str) -> Path:
    """Where the shards of a source lie."""
    return Path(config.folder) / "shards" / source


def require_shards(folder: Path) -> None:
    """Raise InputError where a source has no manifest."""
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"no shards at {folder}: build them with `python data/prepare.py` and the same "
            "overrides"
        )


def require_data(config: DataConfig) -> None:
    """Raise InputError where the tokenizer or a manifest is missing; looks at no shard."""
    path = tokenizer_path(config)
    if not path.is_file():
        raise InputError(
            f"no tokenizer at {path}: build the data with `python data/prepare.py` and the same "
            "overrides"
        )
    for name in config.sources:
        require_shards(source_folder(config, name))


def open_manifests(config: DataConfig) -> dict[str, Manifest]:
    """Manifests of all sources, checked against each other's vocabulary and the tokenizer's file.

    Asks the file system about every shard: call it once, and hand the manifests down.
    """
    require_data(config)
    path = tokenizer_path(config)
    expected = sha256_of(path)
    if config.tokenizer.sha256 not in (None, expected):
        raise InputError(
            f"{path} has sha256 {expected}, not data.tokenizer.sha256 {config.tokenizer.sha256}: "
            "give the overrides that the data was prepared with"
        )
    manifests = {name: read_manifest(source_folder(config, name)) for name in config.sources}
    for name, manifest in manifests.items():
        if manifest.tokenizer_sha256 != expected:
            raise InputError(
                f"shards of {name} were made with another tokenizer than {path}; run `python "
                "data/prepare.py` again"
            )
        if manifest.vocab_size > config.tokenizer.vocab_size:
            raise InputError(
                f"shards of {name} hold ids up to {manifest.vocab_size - 1}, "
                f"data.tokenizer.vocab_size is {config.tokenizer.vocab_size}: give the overrides "
                "that the data was prepared with"
            )
    return manifests


def present_or_expected(config: DataConfig) -> tuple[dict[str, int], list[str]]:
    """Train tokens of every source, and the names of those that are only expected."""
    tokens, expected = {}, []
    for name, source in config.sources.items():
        folder = source_folder(config, name)
        if (folder / MANIFEST).is_file():
            tokens[name] = read_manifest(folder).tokens("train")
        elif source.expected_tokens:
            tokens[name] = source.expected_tokens
            expected.append(name)
        else:
            raise InputError(
                f"source {name} has no shards in {folder} and no expected_tokens: prepare it, or "
                "say how many it has"
            )
    return tokens, expected
