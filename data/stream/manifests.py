"""Manifests: which shards a source has, with their sizes and hashes; written, read and checked.

A source is a folder `<data.folder>/shards/<source>/` with `manifest.json` and, per split ("train",
"heldout"), datatrove `.ds` files: little-endian token ids, no header, every document ended by eos.
Ids are uint16 for a vocabulary of at most 65,536 ids and uint32 for a larger one.
"""

import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from core.errors import InputError
from core.files import sha256_of, write_json
from core.ranges import Count, Whole
from core.records import DamagedRecord, Sha256, read_typed
from data import tokenizer
from data.config import DataConfig
from data.vocabulary import TOKENIZER_CONFIG, content_of, end_id, read_config

MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
NARROW = np.dtype("<u2")  # token ids in shards of a vocabulary of at most 65,536
WIDE = np.dtype("<u4")


@dataclass
class ShardFile:
    """One `.ds` file, named relative to the folder of its source."""

    name: str
    tokens: Whole
    documents: Whole
    sha256: Sha256


@dataclass
class Manifest:
    """The shards of a source, and the recipe and tokenizer that made them."""

    source: str
    licence: str
    recipe: str
    recipe_sha256: Sha256  # of the recipe's version and settings, to detect a changed recipe
    tokenizer_sha256: Sha256
    eos: Whole
    vocab_size: Count  # highest token id + 1
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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of one source.

    Raises InputError if the manifest is absent or contradicts itself, if a shard is missing, is
    outside the folder or has another size, and if documents do not end as the manifest says.
    """
    path = folder / MANIFEST
    require_shards(folder)
    try:
        manifest = read_typed(path, Manifest)
        if manifest.splits.keys() != set(SPLITS):
            raise DamagedRecord(f"splits has {', '.join(manifest.splits) or 'nothing'}")
    except DamagedRecord as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise DamagedRecord(
            f"{path} is not a manifest ({reason}); remove {folder} and prepare the data again"
        ) from error
    names = set()
    for file in manifest.files():
        check_file(folder, file, manifest.dtype)
        if file.name in names or not bool(file.tokens) <= file.documents <= file.tokens:
            problem = "twice" if file.name in names else f"with {file.documents} documents"
            raise DamagedRecord(
                f"{path} lists {file.name} {problem}, {file.tokens} tokens; remove {folder} and "
                "prepare the data again"
            )
        names.add(file.name)
    for split in SPLITS:
        check_end(folder, manifest, split)
    return manifest


def check_end(folder: Path, manifest: Manifest, split: str) -> None:
    """Raise InputError unless the first shard of a split ends with the manifest's end token.

    Every shard ends with a document. Looking at one costs nothing; data/verify.py reads them all.
    """
    file = next((file for file in manifest.splits[split] if file.tokens), None)
    if file is None:
        return
    path, size = folder / file.name, manifest.dtype.itemsize
    with path.open("rb") as shard:
        shard.seek((file.tokens - 1) * size)
        last = int(np.frombuffer(shard.read(size), manifest.dtype)[0])
    if last != manifest.eos:
        raise InputError(
            f"shard {path} ends with id {last}, but {folder / MANIFEST} has eos {manifest.eos}: "
            f"remove {folder} and prepare the data again"
        )


def check_file(folder: Path, file: ShardFile, dtype: np.dtype) -> None:
    """Raise InputError if a shard is missing, is outside its folder or has another size.

    A regular file directly in the folder, the usual case, costs one request to the file system.
    """
    if not file.name or Path(file.name).name != file.name or "\0" in file.name:
        raise InputError(f"{folder / MANIFEST} names {file.name!r}, which is outside its folder")
    path = folder / file.name
    try:
        status = path.lstat()
        size = status.st_size if stat.S_ISREG(status.st_mode) else -1
        if size < 0 and folder.resolve() not in path.resolve().parents:
            raise InputError(f"{folder / MANIFEST} names {file.name}, which is outside its folder")
        if size < 0 and path.is_file():
            size = path.stat().st_size
    except FileNotFoundError:
        size = -1
    except OSError as error:
        raise InputError(f"shard {path} cannot be read: {error}") from error
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
    end = end_id(path, tokenizer.load(path))
    for name, manifest in manifests.items():
        if manifest.eos != end:
            raise InputError(
                f"{source_folder(config, name) / MANIFEST} has eos {manifest.eos}, but {path} "
                f"ends documents with {end}: run `python data/prepare.py` again"
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
