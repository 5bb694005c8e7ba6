"""Taking over a folder that an earlier version prepared: its keys are written anew, its shards stay as they are.

Keys once held the text of our own Python files, which no later version can know. What a folder's records show of how it
was built is compared with the config, every shard is hashed, and only then are keys written; that the other settings
are those it was built with, the user says by asking for it.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import sha256_of
from data import recipes, tokenizer
from data.config import DataConfig, ExecutorConfig
from data.pipeline import fingerprints
from data.pipeline.executors import open_executor
from data.pipeline.workers import exclusive
from data.stream.manifests import Manifest, read_manifest, write_manifest

logger = logging.getLogger(__name__)

PASSES = {
    "near_duplicates": "Near duplicates",
    "exact_substrings": "Exact substrings",
    "decontaminate": "Decontamination",
}


def adopt(cfg: DataConfig, executor: ExecutorConfig | None = None) -> None:
    """Make a prepared folder one that `prepare` reuses.

    Raises InputError, with nothing changed, where its records contradict the config or a shard is another.
    """
    folder = Path(cfg.folder)
    with exclusive(folder):
        listings = {name: fingerprints.list_input(source) for name, source in cfg.sources.items()}
        file = folder / "tokenizer" / tokenizer.FILE
        tokenizer.load(file)
        manifests = {name: read_manifest(folder / "shards" / name) for name in cfg.sources}
        for name, manifest in manifests.items():
            check_manifest(cfg, name, manifest, sha256_of(file))
        cleans = {name: read_clean(cfg, name, manifests[name]) for name in cfg.sources}
        check_shards(cfg, manifests, executor)
        keys = {name: fingerprints.clean_key(cfg, name, listings[name]) for name in cfg.sources}
        for name, manifest in manifests.items():
            if (built := cleans[name]) is not None:
                details = {key: value for key, value in built.items() if key != "key"}
                fingerprints.write_built(folder / "clean" / name, keys[name], **details)
            recipe = fingerprints.recipe_sha256(cfg, name, listings[name])
            write_manifest(folder / "shards" / name, replace(manifest, recipe_sha256=recipe))
            fingerprints.pin_tasks(folder, name, cfg.sources[name].tasks)
            clean = (
                "" if built is not None else "; its clean documents are not there, and prepare would make them again"
            )
            logger.info(f"adopted    {name}: {manifest.tokens('train'):,} train tokens{clean}")
        key = fingerprints.tokenizer_key(cfg, list(keys.values()))
        fingerprints.write_built(folder / "tokenizer", key, sha256=sha256_of(file))


def check_manifest(cfg: DataConfig, name: str, manifest: Manifest, vocabulary: str) -> None:
    """Raise InputError when a manifest tells of another recipe, licence, vocabulary or number of tasks."""
    source = cfg.sources[name]
    fingerprints.check_tasks(Path(cfg.folder), name, source.tasks)
    recorded = {"recipe": manifest.recipe, "licence": manifest.licence, "vocabulary": manifest.tokenizer_sha256}
    wanted = {"recipe": source.recipe, "licence": source.licence, "vocabulary": vocabulary}
    if other := [f"{key} {recorded[key]}, not {wanted[key]}" for key in wanted if recorded[key] != wanted[key]]:
        raise InputError(f"shards of {name} have {'; '.join(other)}: give the config that they were prepared with")


def read_clean(cfg: DataConfig, name: str, manifest: Manifest) -> dict[str, Any] | None:
    """The record of a source's clean documents, None where they are not there; InputError when it contradicts."""
    source, folder = cfg.sources[name], Path(cfg.folder) / "clean" / name
    if source.recipe == recipes.MEGATRON or not (folder / fingerprints.BUILT).is_file():
        return None
    built: dict[str, Any] = json.loads((folder / fingerprints.BUILT).read_text(encoding="utf-8"))
    fix = "give the config that it was prepared with, or remove it"
    if built["files"] != fingerprints.sizes(folder):
        raise InputError(f"{folder} holds other files than were written there: {fix}")
    documents = sum(file.documents for files in manifest.splits.values() for file in files)
    if documents != built["steps"][-1]["forwarded"]:
        raise InputError(f"{folder} has {built['steps'][-1]['forwarded']} documents, its shards {documents}: {fix}")
    names = {step["name"] for step in built["steps"]}
    for setting, step in PASSES.items():
        if bool(getattr(source, setting)) != (step in names):
            raise InputError(f"{folder} was made with{'' if step in names else 'out'} {setting}: {fix}")
    return built


def check_shards(cfg: DataConfig, manifests: dict[str, Manifest], executor: ExecutorConfig | None) -> None:
    """Hash every shard where `prepare` would work; raises InputError with the first that is another."""
    files = [
        (Path(cfg.folder) / "shards" / name / file.name, file.sha256)
        for name, manifest in manifests.items()
        for split in manifest.splits.values()
        for file in split
    ]
    workers = open_executor(executor, cfg.workers, Path(cfg.folder))
    found: list[str] = []
    try:
        jobs = {"shards": [(sha256_of, path) for path, _ in files]}
        workers.run("hash", jobs, lambda _, results: found.extend(results))
    finally:
        workers.close()
    for (path, wanted), sha256 in zip(files, found, strict=True):
        if sha256 != wanted:
            raise InputError(f"shard {path} does not hash to its manifest's SHA-256: prepare its source again")
