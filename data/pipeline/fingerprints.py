"""Keys of built folders: a finished stage is reused only while its key is the same.

A key hashes a recipe's name and version, settings, input files, assets, and versions of the
packages that affect text. It never hashes this project's source code, which may be moved or
reformatted. A finished folder holds `built.json` with its key. A folder being built has the key in
its name, so work started with other settings (recipe, input, number of tasks) is never resumed.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from core.errors import InputError
from core.files import make_folder, publish_folder, sha256_of, write_json
from core.ranges import Whole
from core.records import Schema, read_if_present, read_or_rebuild
from data import recipes, tokenizer, vocabulary
from data.config import Assets, DataConfig, Source
from data.pipeline import clean, megatron, minhash, shard, substrings
from data.pipeline.accounting import StepCounts
from data.readers.listing import Listing, list_raw_files
from data.recipes import MEGATRON, decontamination
from data.stream.documents import document_ends
from data.stream.manifests import Manifest, read_manifest

BUILT = "built.json"
# distributions whose versions affect text, by the module that recipes and passes import; any other
# module counts with its own distribution
DISTRIBUTIONS = {
    "orjson": (),
    "spacy": ("spacy",),
    "trafilatura": ("trafilatura", "lxml", "justext"),
    "lxml_html_clean": ("lxml_html_clean",),
    "fasttext": ("fasttext-numpy2-wheel",),
    "tldextract": ("tldextract",),
    "ahocorasick": ("pyahocorasick",),
    "warcio": ("warcio",),
    # the encoding of a page that is not UTF-8: by its label, and by statistics
    "webencodings": ("webencodings",),
    "cchardet": ("faust-cchardet",),
    "brotli": (),  # any version decompresses the same bytes
    "zstandard": (),
    "xxhash": ("xxhash",),
}
TEXT_SETTINGS = (
    "recipe",
    "tasks",
    "text_key",
    "near_duplicates",
    "exact_substrings",
    "replace_pii",
    "decontaminate",
)


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def list_input(source: Source) -> Listing:
    """List a source's input files; called once, so that a whole build uses the same list."""
    try:
        return (
            megatron.list_raw_files(source.input)
            if source.recipe == MEGATRON
            else list_raw_files(source.input)
        )
    except InputError as error:
        if source.obtained_by is None:
            raise
        raise InputError(f"{error}; obtain it with: {source.obtained_by}") from error


def versions_of(source: Source) -> dict[str, int | str]:
    """Versions of everything that affects a source's text: recipe, passes and packages."""
    if source.recipe == MEGATRON:
        return {MEGATRON: megatron.RECIPE_VERSION}
    recipe = recipes.load(source.recipe)
    versions: dict[str, int | str] = {
        source.recipe: recipe.RECIPE_VERSION,
        "cleaning": clean.VERSION,
    }
    imports = [*recipe.REQUIRES]
    if source.near_duplicates is not None:
        versions["near_duplicates"] = minhash.VERSION
        imports += minhash.REQUIRES
    if source.exact_substrings:
        versions["exact_substrings"] = substrings.VERSION
        imports += substrings.REQUIRES
    if source.decontaminate:
        versions["decontaminate"] = decontamination.VERSION
    packages = {package for name in imports for package in distributions(name)}
    return versions | {package: version(package) for package in sorted(packages | {"datatrove"})}


def distributions(module: str) -> tuple[str, ...]:
    """Distributions whose versions enter the key for a module that a recipe requires."""
    if module in DISTRIBUTIONS:
        return DISTRIBUTIONS[module]
    return tuple(dict.fromkeys(packages_distributions().get(module.split(".")[0], [])))


def shard_versions(source: Source) -> dict[str, str | int]:
    """Versions of the steps from clean documents to shards; stored in the manifest."""
    if source.recipe == MEGATRON:
        return {MEGATRON: megatron.RECIPE_VERSION}
    return {"sharding": shard.VERSION, "tokenizers": version("tokenizers")}


def describe_changes(before: dict[str, str | int], now: dict[str, str | int]) -> str:
    """Changed versions as text, such as `datatrove 0.9.0, now 0.10.1`; empty if none changed."""
    if not before:
        return "a version of this project before 0.2"
    return ", ".join(
        f"{key} {before.get(key)}, now {now[key]}"
        for key in sorted(now)
        if before.get(key) != now[key]
    )


def settings_of(name: str, source: Source, assets: Assets) -> list[Any]:
    """Everything that decides a source's text except its input: settings, versions, assets."""
    required = clean.check_assets(name, source, assets)
    hashes = {asset: sha256_of(Path(getattr(assets, asset).path)) for asset in required}
    optional = {asset: getattr(assets, asset).path for asset in clean.OPTIONAL_ASSETS}
    hashes |= {asset: sha256_of(Path(path)) for asset, path in optional.items() if path}
    licence = source.licence  # the recipe source_code filters files by it
    return [text_settings(source), licence, versions_of(source), hashes]


def text_settings(source: Source) -> dict[str, Any]:
    """The settings of a source that decide its text."""
    return {key: getattr(source, key) for key in TEXT_SETTINGS}


def provenance(source: Source, listing: Listing) -> dict[str, Any]:
    """Versions, settings and input files, stored with clean documents for later comparison."""
    return {
        "versions": versions_of(source),
        "settings": text_settings(source),
        "input": [listing.kind, listing.sizes],
    }


def recipe_sha256(cfg: DataConfig, name: str, listing: Listing) -> str:
    """Hash of everything that decides a source's shards except the tokenizer.

    Leaves out the input's path and mtimes: the same files elsewhere give the same shards.
    """
    input_files = [listing.kind, listing.sizes]
    settings = settings_of(name, cfg.sources[name], cfg.assets)
    return digest(settings, input_files, cfg.seed, cfg.heldout_percent)


def clean_key(cfg: DataConfig, name: str, listing: Listing) -> str:
    """Hash of everything that decides a source's clean documents, with its input files' mtimes."""
    source = cfg.sources[name]
    input_files = [source.input, listing.kind, listing.files]
    return digest(settings_of(name, source, cfg.assets), input_files, cfg.keep_exclusions)


def tokenizer_key(cfg: DataConfig, clean_keys: list[str]) -> str:
    """Hash of everything that decides the tokenizer: its file, or training texts and settings."""
    settings = cfg.tokenizer
    if settings.path is not None:
        # with vocab_size, so that a changed value is checked against the file again
        path = Path(settings.path)
        eos_token = vocabulary.end_token(path, tokenizer.load(path), settings.eos_token)
        # keys of before 0.3 had no end token
        other = [] if eos_token == tokenizer.EOS_TOKEN else [eos_token]
        return digest(sha256_of(path), settings.vocab_size, *other)
    training = [settings.vocab_size, settings.train_megabytes, cfg.heldout_percent]
    return digest(clean_keys, training, tokenizer.TRAINING_VERSION, version("tokenizers"))


def shards_key(manifest: Manifest) -> str:
    """Hash of everything that decides a source's shards; names the folder they are built in."""
    return digest(asdict(replace(manifest, splits={})))


def shards_match(folder: Path, expected: Manifest) -> bool:
    """Whether a folder's manifest equals `expected` except for files, and every shard its hash."""
    try:
        manifest = read_manifest(folder)
    except InputError:
        return False
    if replace(manifest, splits=expected.splits) != expected:
        return False
    for file in manifest.files():
        try:
            document_ends(folder, file)
        except InputError:
            return False
    return all(sha256_of(folder / file.name) == file.sha256 for file in manifest.files())


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of clean documents in a folder, by name."""
    return {path.name: path.stat().st_size for path in folder.glob("*.jsonl.gz")}


def write_built(folder: Path, key: str, **details: Any) -> None:
    """Mark a folder as complete with its key and details."""
    write_json(folder / BUILT, {"key": key, **details})


class BuiltTokenizer(TypedDict):
    """Content of built.json beside a tokenizer."""

    key: str
    sha256: str  # of tokenizer.json
    files: NotRequired[dict[str, str]]  # name -> SHA-256; absent before 0.3


class Versions(TypedDict):
    """Versions of what wrote a folder; absent before 0.2."""

    versions: NotRequired[dict[str, str | int]]


class BuiltClean(Versions):
    """Content of built.json in a folder of clean documents; versions before 0.2 wrote less."""

    key: str
    files: dict[str, Whole]  # bytes
    steps: Annotated[list[StepCounts], Field(min_length=1)]
    settings: NotRequired[dict[str, Any]]
    input: NotRequired[tuple[str, dict[str, Whole]]]


def read_built(folder: Path, schema: type[Schema], key: str) -> Schema | None:
    """Details of a complete folder; None if it is incomplete or has another key.

    A damaged record is a warning: the folder counts as incomplete.
    """
    built: Any = read_or_rebuild(folder / BUILT, schema, "the folder is built again")
    return built if built and built["key"] == key else None


def open_build_dir(folder: Path, stage: str, key: str) -> Path:
    """Open `building/<stage>/<key>`, new or from a killed run; removes folders of other keys."""
    parent = folder / "building" / stage
    build_dir = parent / key[:16]
    for path in parent.iterdir() if parent.is_dir() else ():
        if path != build_dir:
            shutil.rmtree(path)
    make_folder(build_dir)
    return build_dir


def move_into_place(build_dir: Path, folder: Path) -> None:
    """Replace `folder` with a complete build; after a kill in between, the next run moves it."""
    remove_folder(folder)
    publish_folder(build_dir, folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


class PinnedTasks(TypedDict):
    """Content of locks/SOURCE.json."""

    tasks: Whole


def check_num_tasks(folder: Path, name: str, tasks: int) -> None:
    """Raise InputError if a source was started with another number of tasks.

    Finished tasks would be discarded; with plain datatrove, documents would be lost.
    """
    lock = folder / "locks" / f"{name}.json"
    fix = "restore it, or remove it to rebuild the source"
    pinned = read_if_present(lock, PinnedTasks, fix)
    if pinned is not None and pinned["tasks"] != tasks:
        raise InputError(
            f"source {name} was started with {pinned['tasks']} tasks, not {tasks}: set "
            f"data.sources.{name}.tasks={pinned['tasks']}, or remove {lock} to rebuild the source"
        )


def pin_num_tasks(folder: Path, name: str, tasks: int) -> None:
    """Record the number of tasks that a source is started with."""
    lock = folder / "locks" / f"{name}.json"
    make_folder(lock.parent)
    write_json(lock, {"tasks": tasks}, indent=None)
