"""What a folder was built from: one hash per stage, so that a finished folder is reused only while it is right.

A built folder holds `built.json` with its key. A folder under construction bears its key in its name, so whatever was
begun under other settings (another recipe, input, number of tasks) is never taken up.
"""

import hashlib
import json
import platform
import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.config import DataConfig, InputError, Source
from data.recipes import path_of
from data.recipes.readers import HOST, raw_files
from data.shards import Manifest, read_manifest, sha256_of

BUILT = "built.json"
ROOT = Path(__file__).resolve().parent
SHARED_CODE = [ROOT / name for name in ("recipes/readers.py", "recipes/filters.py", "recipes/host.py", "pipelines.py")]
PACKAGES = ("datatrove", "trafilatura", "spacy", "warcio")  # their versions shape the text


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


Listing = tuple[str, dict[str, list[Any]]] | None  # kind, and [bytes, time of change] by name; None for the host's text


def list_input(source: Source) -> Listing:
    """The files of a source's input, looked at once: the whole build works from this list."""
    return None if source.input == HOST else raw_files(source.input)


def recipe_sha256(cfg: DataConfig, source: Source, listing: Listing) -> str:
    """Hash of all that decides a source's shards but the vocabulary: settings, code, versions, files of input.

    The input's place and times are left out: the same files elsewhere give the same shards.
    """
    text: Any = platform.python_version()
    if listing is not None:
        kind, files = listing
        text = [kind, {name: size for name, (size, _) in files.items()}]
    code = [sha256_of(path) for path in (path_of(source.recipe), *SHARED_CODE)]
    versions = [version(package) for package in PACKAGES]
    return digest(source.recipe, source.tasks, text, code, versions, cfg.seed, cfg.heldout_percent)


def clean_key(source: Source, listing: Listing) -> str:
    """Hash of all that decides a source's clean documents, the times of its input files included."""
    text: Any = platform.python_version() if listing is None else [source.input, *listing]
    code = [sha256_of(path) for path in (path_of(source.recipe), *SHARED_CODE)]
    return digest(source.recipe, source.tasks, text, code, [version(package) for package in PACKAGES])


def tokenizer_key(cfg: DataConfig, clean_keys: list[str]) -> str:
    """Hash of all that decides the vocabulary: the file it is copied from, or the texts and settings of training."""
    settings = cfg.tokenizer
    code = sha256_of(ROOT / "tokenizer.py")
    if settings.path is not None:
        return digest(sha256_of(Path(settings.path)), settings.vocab_size, code)  # a smaller size is checked again
    numbers = [settings.vocab_size, settings.train_megabytes, cfg.heldout_percent]
    return digest(clean_keys, numbers, code, version("tokenizers"))


def shards_key(manifest: Manifest) -> str:
    """Hash of all that decides a source's shards, for the name of their folder under construction."""
    return digest(asdict(replace(manifest, splits={})))


def same_shards(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of shards that are what is wanted and whose every byte is unchanged, else None."""
    try:
        found = read_manifest(folder)
    except InputError:
        return None
    if replace(found, splits=wanted.splits) != wanted:
        return None
    files = [file for files in found.splits.values() for file in files]
    return found if all(sha256_of(folder / file.name) == file.sha256 for file in files) else None


def write_built(folder: Path, key: str, **details: Any) -> None:
    """Mark a folder as complete."""
    (folder / BUILT).write_text(json.dumps({"key": key, **details}, indent=1) + "\n", encoding="utf-8")


def read_built(folder: Path, key: str) -> dict[str, Any] | None:
    """The details of a complete folder with this key, else None."""
    try:
        built = json.loads((folder / BUILT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return built if isinstance(built, dict) and built.get("key") == key else None


def construction(folder: Path, stage: str, key: str) -> Path:
    """The folder `building/<stage>/<key>`, kept from a killed run; those of other keys are removed."""
    parent = folder / "building" / stage
    place = parent / key[:16]
    for other in parent.iterdir() if parent.is_dir() else ():
        if other != place:
            shutil.rmtree(other)
    place.mkdir(parents=True, exist_ok=True)
    return place


def install(built: Path, place: Path) -> None:
    """Move a complete folder into place; a kill in between leaves it complete under construction, to be moved next."""
    discard(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    built.rename(place)


def discard(folder: Path) -> None:
    """Remove a folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
