"""Manifests: which shards a source has, with their sizes and hashes; written, read and checked.

A source is a folder `<data.folder>/shards/<source>/` with `manifest.json` and, per split ("train",
"heldout"), datatrove `.ds` files: little-endian token ids, no header, every document ended by eos.
Ids are uint16 for a vocabulary of at most 65,536 ids and uint32 for a larger one.
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
from data.vocabulary import TOKENIZER_CONFIG, content_of, read_config

MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
NARROW = np.dtype("<u2")  # token ids in shards of a vocabulary of at most 65,536
WIDE = np.dtype("<u4")


@dataclass
class ShardFile:
    """One `.ds` file, named relative to the folder of its source."""

    name: str
    tokens: int
    documents: int
    sha256: str


@dataclass
class Manifest:
    """The shards of a source, and the recipe and tokenizer that made them."""

    source: str
    licence: str
    recipe: str
    recipe_sha256: str  # of the recipe's version and settings, to detect a changed recipe
    tokenizer_sha256: str
    eos: int
    vocab_size: int  # highest token id + 1
    splits: dict[str, list[ShardFile]]
    # versions of tokenizer and sharding code; empty in manifests written before 0.2
    versions: dict[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.eos < self.vocab_size <= 2**32:
            raise ValueError(f"eos {self.eos} and vocab_size {self.vocab_size} cannot be")

    @property
    def dtype(self) -> np.dtype:
        """Type of the token ids in the shards."""
        return id_dtype(self.vocab_size)

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(file.tokens for file in self.splits[split])

    def files(self) -> list[ShardFile]:
        """The files of all splits."""
        return [file for split in self.splits.values() for file in split]


def id_dtype(vocab_size: int) -> np.dtype:
    """Type of the token ids of a vocabulary in shards."""
    return NARROW if vocab_size <= 2**16 else WIDE


def parse_manifest(raw: dict[str, Any]) -> Manifest:
    """Build a manifest from JSON; raises KeyError, TypeError or ValueError if it is malformed."""
    splits = {split: [ShardFile(**file) for file in raw["splits"][split]] for split in SPLITS}
    return Manifest(**{**raw, "splits": splits})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of one source.

    Raises InputError if the manifest is absent, or if a shard is missing, is outside the folder or
    has another size.
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
        check_file(folder, file, manifest.dtype)
    return manifest


def check_file(folder: Path, file: ShardFile, dtype: np.dtype) -> None:
    """Raise InputError if a shard is missing, is outside its folder or has another size.

    A regular file directly in the folder, the usual case, costs one request to the file system.
    """
    path = folder / file.name
    size = -1
    with suppress(OSError):
        status = path.lstat()
        size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    if size < 0 or path.parent != folder:
        if folder.resolve() not in path.resolve().parents:
            raise InputError(f"{folder / MANIFEST} names {file.name}, which is outside its folder")
        size = path.stat().st_size if path.is_file() else -1
    expected = file.tokens * dtype.itemsize
    if size != expected:
        problem = "is missing" if size < 0 else f"has {size} bytes instead of {expected}"
        raise InputError(f"shard {path} {problem}; remove {folder} and prepare the data again")


def tokenizer_path(config: DataConfig) -> Path:
    """Path of the tokenizer that made the shards."""
    return Path(config.folder) / "tokenizer" / "tokenizer.json"


def source_folder(config: DataConfig, source: str) -> Path:
    """Folder of a source's shards."""
    return Path(config.folder) / "shards" / source


def require_shards(folder: Path) -> None:
    """Raise InputError if a source has no manifest."""
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"no shards in {folder}: run `python data/prepare.py` with the same overrides"
        )


def require_data(config: DataConfig) -> None:
    """Raise InputError if the tokenizer or a manifest is missing; does not check the shards."""
    path = tokenizer_path(config)
    if not path.is_file():
        raise InputError(
            f"no tokenizer at {path}: run `python data/prepare.py` with the same overrides"
        )
    for name in config.sources:
        require_shards(source_folder(config, name))


def open_manifests(config: DataConfig) -> dict[str, Manifest]:
    """Read the manifests of all sources and check that the tokenizer made their shards.

    Asks the file system about every shard: call it once and pass the manifests on.
    """
    require_data(config)
    path = tokenizer_path(config)
    expected = sha256_of(path)
    if config.tokenizer.sha256 not in (None, expected):
        raise InputError(
            f"{path} has sha256 {expected}, but data.tokenizer.sha256 is "
            f"{config.tokenizer.sha256}: use the overrides of data/prepare.py"
        )
    manifests = {name: read_manifest(source_folder(config, name)) for name in config.sources}
    check_end_token(config, manifests)
    for name, manifest in manifests.items():
        if manifest.tokenizer_sha256 != expected:
            raise InputError(
                f"the shards of {name} were made with another tokenizer than {path}: run "
                "`python data/prepare.py` again"
            )
        if manifest.vocab_size > config.tokenizer.vocab_size:
            raise InputError(
                f"the shards of {name} have token ids up to {manifest.vocab_size - 1}, but "
                f"data.tokenizer.vocab_size is {config.tokenizer.vocab_size}: use the overrides of "
                "data/prepare.py"
            )
    return manifests


def check_end_token(config: DataConfig, manifests: dict[str, Manifest]) -> None:
    """Raise InputError if documents end differently among sources, or not as the config says."""
    if len({manifest.eos for manifest in manifests.values()}) > 1:
        ends = ", ".join(f"{name} with {manifest.eos}" for name, manifest in manifests.items())
        raise InputError(
            f"documents end with different ids ({ends}): run `python data/prepare.py` again"
        )
    path = tokenizer_path(config).with_name(TOKENIZER_CONFIG)
    prepared = content_of(read_config(path).get("eos_token"))
    if config.tokenizer.eos_token not in (None, prepared):
        raise InputError(
            f"data.tokenizer.eos_token is {config.tokenizer.eos_token}, but the shards were "
            f"prepared with {prepared}: use the overrides of data/prepare.py"
        )


def reset_token(config: DataConfig, manifest: Manifest) -> int | None:
    """The id after which the model's state is reset; None if documents do not reset it."""
    return manifest.eos if config.reset_state else None


def actual_or_expected_tokens(config: DataConfig) -> tuple[dict[str, int], list[str]]:
    """Train tokens of every source, and the sources for which they are only expected."""
    tokens = {}
    expected = []
    for name, source in config.sources.items():
        folder = source_folder(config, name)
        if (folder / MANIFEST).is_file():
            tokens[name] = read_manifest(folder).tokens("train")
        elif source.expected_tokens:
            tokens[name] = source.expected_tokens
            expected.append(name)
        else:
            raise InputError(
                f"source {name} has no shards in {folder}: prepare it, or set "
                f"data.sources.{name}.expected_tokens"
            )
    return tokens, expected
