"""What a folder was built from: one hash per stage, so that a finished folder is reused only while
it is right.

The hash is of a recipe's name and version, of settings, input files, assets, and versions of the
packages that shape text; never of our own source text, which may be moved or reformatted. A built
folder holds `built.json` with its key. A folder under construction bears its key in its name, so
whatever was begun under other settings (another recipe, input, number of tasks) is never taken up.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import read_json, sha256_of, write_json
from data import recipes, tokenizer
from data.config import Assets, DataConfig, Source
from data.pipeline import clean, megatron, minhash, shard, substrings
from data.recipes import MEGATRON, decontamination
from data.recipes.readers import list_raw_files
from data.stream.documents import document_ends
from data.stream.manifests import Manifest, read_manifest

BUILT = "built.json"
# distributions whose versions shape text, by what recipes and passes import; a module that is not
# here counts with its own distribution
SHAPING = {
    "orjson": (),
    "spacy": ("spacy",),
    "trafilatura": ("trafilatura", "lxml", "justext"),
    "lxml_html_clean": ("lxml_html_clean",),
    "fasttext": ("fasttext-numpy2-wheel",),
    "tldextract": ("tldextract",),
    "ahocorasick": ("pyahocorasick",),
    # faust-cchardet guesses the encoding of a page that is not UTF-8
    "warcio": ("warcio", "faust-cchardet"),
    "magic": ("python-magic",),  # which says what is a page where the archive does not
    "pylibmagic": ("pylibmagic",),
    "xxhash": ("xxhash",),
}
SHAPES_TEXT = (
    "recipe",
    "tasks",
    "text_key",
    "near_duplicates",
    "exact_substrings",
    "replace_pii",
    "decontaminate",
)


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


Listing = tuple[str, dict[str, list[Any]]]  # kind, and [bytes, time of change] by name


def list_input(source: Source) -> Listing:
    """The files of a source's input, looked at once: the whole build works from this list."""
    try:
        return (
            megatron.raw_files(source.input)
            if source.recipe == MEGATRON
            else list_raw_files(source.input)
        )
    except InputError as error:
        if source.obtained_by is None:
            raise
        raise InputError(f"{error}; it is obtained by: {source.obtained_by}") from error


def versions_of(source: Source) -> dict[str, int | str]:
    """Versions of all that shapes a source's text: its recipe, its passes, packages."""
    if source.recipe == MEGATRON:
        return {MEGATRON: megatron.RECIPE_VERSION}
    recipe = recipes.load(source.recipe)
    found: dict[str, int | str] = {source.recipe: recipe.RECIPE_VERSION, "cleaning": clean.VERSION}
    imports = [*recipe.REQUIRES]
    if source.near_duplicates is not None:
        found["near_duplicates"] = minhash.VERSION
        imports += minhash.REQUIRES
    if source.exact_substrings:
        found["exact_substrings"] = substrings.VERSION
        imports += substrings.REQUIRES
    if source.decontaminate:
        found["decontaminate"] = decontamination.VERSION
    packages = {package for name in imports for package in distributions(name)}
    return found | {package: version(package) for package in sorted(packages | {"datatrove"})}


def distributions(module: str) -> tuple[str, ...]:
    """The distributions whose versions count for a module that a recipe requires."""
    if module in SHAPING:
        return SHAPING[module]
    return tuple(dict.fromkeys(packages_distributions().get(module.split(".")[0], [])))


def shard_versions(source: Source) -> dict[str, str | int]:
    """Versions of what makes shards of clean documents; the manifest keeps them."""
    if source.recipe == MEGATRON:
        return {MEGATRON: megatron.RECIPE_VERSION}
    return {"sharding": shard.VERSION, "tokenizers": version("tokenizers")}


def changes(before: dict[str, str | int], now: dict[str, str | int]) -> str:
    """What has another version now, for a reader; empty where nothing has."""
    if not before:
        return "a version of this project before 0.2"
    return ", ".join(
        f"{key} {before.get(key)}, now {now[key]}"
        for key in sorted(now)
        if before.get(key) != now[key]
    )


def settings_of(name: str, source: Source, assets: Assets) -> list[Any]:
    """All that decides a source's text but its input: settings, versions, assets."""
    read = clean.check_assets(name, source, assets)
    files = {asset: sha256_of(Path(getattr(assets, asset).path)) for asset in read}
    optional = {
        asset: getattr(assets, asset).path for asset in ("math_classifier", "url_blocklist")
    }
    files |= {
        asset: sha256_of(Path(path))
        for asset, path in optional.items()
        if path and Path(path).is_file()
    }
    licence = source.licence  # recipe source_code judges files by it
    return [shaping(source), licence, versions_of(source), files]


def shaping(source: Source) -> dict[str, Any]:
    """The settings of a source that decide its text."""
    return {key: getattr(source, key) for key in SHAPES_TEXT}


def made_of(source: Source, listing: Listing) -> dict[str, Any]:
    """What a record keeps of how documents were made, for whoever asks whether they can stay."""
    kind, files = listing
    sizes = {name: size for name, (size, _) in files.items()}
    return {"versions": versions_of(source), "settings": shaping(source), "input": [kind, sizes]}


def recipe_sha256(cfg: DataConfig, name: str, listing: Listing) -> str:
    """Hash of all that decides a source's shards but the vocabulary: settings, versions, files of
    input.

    The input's place and times are left out: the same files elsewhere give the same shards.
    """
    kind, files = listing
    text = [kind, {name: size for name, (size, _) in files.items()}]
    settings = settings_of(name, cfg.sources[name], cfg.assets)
    return digest(settings, text, cfg.seed, cfg.heldout_percent)


def clean_key(cfg: DataConfig, name: str, listing: Listing) -> str:
    """Hash of all that decides a source's clean documents, with the times of its input files."""
    source = cfg.sources[name]
    text = [source.input, *listing]
    return digest(settings_of(name, source, cfg.assets), text, cfg.keep_exclusions)


def tokenizer_key(cfg: DataConfig, clean_keys: list[str]) -> str:
    """Hash of all that decides the vocabulary: its file, or the texts and settings of training."""
    settings = cfg.tokenizer
    if settings.path is not None:
        # a smaller size is checked again
        return digest(sha256_of(Path(settings.path)), settings.vocab_size)
    numbers = [settings.vocab_size, settings.train_megabytes, cfg.heldout_percent]
    return digest(clean_keys, numbers, tokenizer.TRAINING_VERSION, version("tokenizers"))


def shards_key(manifest: Manifest) -> str:
    """Hash of all that decides a source's shards; names their folder under construction."""
    return digest(asdict(replace(manifest, splits={})))


def same_shards(folder: Path, wanted: Manifest) -> bool:
    """Whether the shards in a folder are what is wanted and every byte of them is unchanged."""
    try:
        found = read_manifest(folder)
    except InputError:
        return False
    if replace(found, splits=wanted.splits) != wanted:
        return False
    for file in found.files():
        try:
            document_ends(folder, file)
        except InputError:
            return False
    return all(sha256_of(folder / file.name) == file.sha256 for file in found.files())


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the clean documents' files in a folder."""
    return {path.name: path.stat().st_size for path in folder.glob("*.jsonl.gz")}


def write_built(folder: Path, key: str, **details: Any) -> None:
    """Mark a folder as complete."""
    write_json(folder / BUILT, {"key": key, **details})


def read_built(folder: Path, key: str) -> dict[str, Any] | None:
    """The details of a complete folder with this key, else None."""
    built = read_json(folder / BUILT)
    return built if built.get("key") == key else None


def construction(folder: Path, stage: str, key: str) -> Path:
    """The folder `building/<stage>/<key>`, kept from a killed run; removes those of other keys."""
    parent = folder / "building" / stage
    place = parent / key[:16]
    for other in parent.iterdir() if parent.is_dir() else ():
        if other != place:
            shutil.rmtree(other)
    place.mkdir(parents=True, exist_ok=True)
    return place


def install(built: Path, place: Path) -> None:
    """Move a complete folder into place; after a kill in between, the next run moves it."""
    discard(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    built.rename(place)


def discard(folder: Path) -> None:
    """Remove a folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def check_tasks(folder: Path, name: str, tasks: int) -> None:
    """Raise InputError when a source was begun with another number of tasks.

    Finished tasks would be thrown away or, with datatrove alone, documents lost.
    """
    lock = folder / "locks" / f"{name}.json"
    if (
        lock.is_file()
        and (pinned := json.loads(lock.read_text(encoding="utf-8"))["tasks"]) != tasks
    ):
        raise InputError(
            f"source {name} was begun with {pinned} tasks, not {tasks}: set "
            f"data.sources.{name}.tasks={pinned}, or remove {lock} to build it anew"
        )


def pin_tasks(folder: Path, name: str, tasks: int) -> None:
    """Remember the number of tasks that a source is begun with."""
    lock = folder / "locks" / f"{name}.json"
    lock.parent.mkdir(parents=True, exist_ok=True)
    write_json(lock, {"tasks": tasks}, indent=None)
