"""Adopt a folder that an earlier version prepared: write new keys, keep the shards.

Before 0.2, keys hashed this project's source files, so later versions cannot recompute them.
Adoption compares the records of each source with the config: settings, input, passes and tokenizer.
It hashes every shard, and remakes those of the first task from the clean documents: identical bytes
confirm seed, held-out share and order. Text of cleaning version 1 is kept if version 2 would read
the same characters and rows. It cannot check the content of input files and assets, documents that
version 1 dropped, nor, in records before 0.2, the input's sizes, `text_key` and the values of
passes (14x8 or 93x15, 50 tokens or 100).
"""

import logging
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from core.errors import InputError
from core.files import sha256_of
from core.records import read_required
from data import recipes, tokenizer, vocabulary
from data.config import DataConfig, ExecutorConfig
from data.pipeline import clean, fingerprints
from data.pipeline.executors import TaskExecutor, open_executor
from data.pipeline.shard import CleanDocuments
from data.pipeline.shard_jobs import shard_jobs
from data.pipeline.workers import lock_folder
from data.readers.listing import Listing, read_pinned_list
from data.readers.normalize import normalize
from data.stream.documents import document_ends, read_clean
from data.stream.manifests import (
    MANIFEST,
    Manifest,
    read_manifest,
    source_folder,
    tokenizer_path,
    write_manifest,
)

logger = logging.getLogger(__name__)

# setting of a source -> name of its step in the records
PASSES = {
    "near_duplicates": "Near duplicates",
    "exact_substrings": "Exact substrings",
    "replace_pii": "PII",
    "decontaminate": "Decontamination",
}
FIX = "use the config that it was prepared with"


def is_normalized(path: Path) -> bool:
    """Whether every clean document of a file has the characters that the readers make."""
    return all(normalize(row["text"]) == row["text"] for row in read_clean(path))


class Adoption:
    """Adoption of one folder; `check` must pass before `write` changes anything."""

    def __init__(self, cfg: DataConfig, executor_config: ExecutorConfig | None) -> None:
        self.cfg = cfg
        self.executor_config = executor_config
        self.folder = Path(cfg.folder)
        self.remade = self.folder / "building" / "adopt"  # shards made again for comparison
        self.tokenizer_file = tokenizer_path(cfg)
        self.eos = -1  # of the tokenizer
        self.listings: dict[str, Listing] = {}
        self.manifests: dict[str, Manifest] = {}
        self.built: dict[str, fingerprints.BuiltClean] = {}  # records of clean documents, by source
        self.skipped: dict[str, str] = {}  # source -> why it is not adopted
        self.of_cleaning_1: list[str] = []  # sources that version 1 of clean.VERSION made

    def check(self) -> None:
        """Raise InputError if a record contradicts the config or a shard differs."""
        self.check_tokenizer()
        for name, source in self.cfg.sources.items():
            self.listings[name] = fingerprints.list_input(source)
            if not (source_folder(self.cfg, name) / MANIFEST).is_file():
                self.skipped[name] = "it has no shards"
                continue
            self.manifests[name] = read_manifest(source_folder(self.cfg, name))
            self.check_manifest(name)
            if source.recipe != recipes.MEGATRON:
                self.check_clean(name)
        try:
            with closing(
                open_executor(self.executor_config, self.cfg.workers, self.folder)
            ) as executor:
                self.check_normalized(executor)
                self.check_hashes(executor)
                self.check_remade(executor)
        finally:
            fingerprints.remove_folder(self.remade)

    def check_tokenizer(self) -> None:
        """The tokenizer is the file that the config names, or has the size that it trains."""
        settings, file = self.cfg.tokenizer, self.tokenizer_file
        self.eos = vocabulary.end_id(file, loaded := tokenizer.load(file))
        vocab_size = vocabulary.required_vocab_size(loaded)
        if settings.path is not None and sha256_of(Path(settings.path)) != sha256_of(file):
            raise InputError(f"{file} differs from data.tokenizer.path, {settings.path}: {FIX}")
        if settings.path is None and vocab_size != settings.vocab_size:
            raise InputError(
                f"{file} has {vocab_size} ids, data.tokenizer.vocab_size is "
                f"{settings.vocab_size}: {FIX}"
            )

    def check_manifest(self, name: str) -> None:
        """The shards have this recipe, licence, tokenizer and number of tasks, and are complete."""
        source, manifest = self.cfg.sources[name], self.manifests[name]
        fingerprints.check_num_tasks(self.folder, name, source.tasks)
        recorded = {
            "recipe": manifest.recipe,
            "licence": manifest.licence,
            "tokenizer": manifest.tokenizer_sha256,
            "end token": manifest.eos,
        }
        expected = {
            "recipe": source.recipe,
            "licence": source.licence,
            "tokenizer": sha256_of(self.tokenizer_file),
            "end token": self.eos,
        }
        differences = [
            f"{key} {recorded[key]}, not {expected[key]}"
            for key in expected
            if recorded[key] != expected[key]
        ]
        if differences:
            raise InputError(f"shards of {name} have {'; '.join(differences)}: {FIX}")
        for file in manifest.files():
            document_ends(source_folder(self.cfg, name), file)
        self.check_versions(name, manifest.versions, fingerprints.shard_versions(source))

    def check_clean(self, name: str) -> None:
        """The clean documents match the shards, the input, and the source's passes and settings."""
        source, folder = self.cfg.sources[name], self.folder / "clean" / name
        if not (folder / fingerprints.BUILT).is_file():
            self.skipped[name] = "its clean documents, the only record of its settings, are missing"
            return
        fix = f"remove {folder}"
        built = read_required(folder / fingerprints.BUILT, fingerprints.BuiltClean, fix)
        pinned = read_pinned_list(folder)
        files, documents = built["files"], built["steps"][-1].forwarded
        step_names = {step.name for step in built["steps"]}
        recorded_input = [pinned["kind"], sorted(pinned["files"])]
        recorded_settings = built.get("settings", {})
        recorded_sizes = built.get("input", (None, None))[1]
        if files != fingerprints.file_sizes(folder):
            raise InputError(f"files in {folder} differ from its {fingerprints.BUILT}: remove it")
        listing = self.listings[name]
        listed = [listing.kind, sorted(listing.files)]
        if recorded_input != listed or recorded_sizes not in (None, listing.sizes):
            raise InputError(
                f"{folder} was made from other input files than those in {source.input}: {FIX}"
            )
        sharded = sum(file.documents for file in self.manifests[name].files())
        if documents != sharded:
            raise InputError(f"{folder} has {documents} documents, its shards {sharded}: {FIX}")
        for setting, step_name in PASSES.items():
            has_step = step_name in step_names
            if bool(getattr(source, setting)) != has_step:
                raise InputError(
                    f"{folder} was made with{'' if has_step else 'out'} {setting}: {FIX}"
                )
        settings = fingerprints.text_settings(source)
        differences = [
            f"{key} {value}, not {settings[key]}"
            for key, value in recorded_settings.items()
            if value != settings.get(key)
        ]
        if differences:
            raise InputError(f"{folder} was made with {'; '.join(differences)}: {FIX}")
        self.built[name] = built
        self.check_versions(name, built.get("versions", {}), fingerprints.versions_of(source))

    def check_versions(
        self, name: str, recorded: dict[str, str | int], current: dict[str, str | int]
    ) -> None:
        """Skip a source whose recipe or passes have another version; warn for other packages."""
        rules = {key for key, value in current.items() if isinstance(value, int)}
        # records before 0.2 hold no versions, and all versions were 1
        recorded = recorded or dict.fromkeys(rules, 1)
        changed_rules = [
            f"{key} {recorded.get(key)}, now {current[key]}"
            for key in sorted(rules)
            if recorded.get(key) != current[key]
        ]
        if changed_rules == [f"cleaning 1, now {clean.VERSION}"]:
            self.of_cleaning_1.append(name)  # its text decides
        elif changed_rules:
            self.skipped[name] = (
                f"its recipe or passes had another version ({', '.join(changed_rules)})"
            )
        changed_packages = [
            f"{key} {recorded[key]}, now {current[key]}"
            for key in sorted(current.keys() & recorded.keys() - rules)
            if recorded[key] != current[key]
        ]
        if changed_packages:
            logger.warning(
                f"{name} was made with {', '.join(changed_packages)}: assuming that its text is "
                "the same"
            )

    def check_normalized(self, executor: TaskExecutor) -> None:
        """Skip sources whose rows or text the readers of `clean.VERSION` 2 would change."""
        jobs = {
            name: [
                (is_normalized, self.folder / "clean" / name / file)
                for file in self.built[name]["files"]
            ]
            for name in self.of_cleaning_1
        }
        for name, normalized in executor.run("read", jobs):
            lost = self.built[name]["steps"][0].dropped.get("corrupt", 0)
            if lost or not all(normalized):
                self.skipped[name] = (
                    f"its recipe or passes had another version (cleaning 1, now {clean.VERSION}), "
                    f"which would read {'more rows' if lost else 'other characters'}"
                )

    def check_hashes(self, executor: TaskExecutor) -> None:
        """Hash every shard with the executor that `prepare` uses."""
        paths = {
            name: [source_folder(self.cfg, name) / file.name for file in manifest.files()]
            for name, manifest in self.manifests.items()
        }
        jobs = {name: [(sha256_of, path) for path in paths[name]] for name in paths}
        for name, hashes in executor.run("hash", jobs):
            files = self.manifests[name].files()
            for path, file, sha256 in zip(paths[name], files, hashes, strict=True):
                if sha256 != file.sha256:
                    raise InputError(
                        f"shard {path} has another SHA-256 than its manifest: prepare its source "
                        "again"
                    )

    def check_remade(self, executor: TaskExecutor) -> None:
        """Tokenize the first task of every adopted source again and compare the shards."""
        fingerprints.remove_folder(self.remade)
        jobs = {}
        for name in self.cfg.sources:
            if name in self.skipped:
                continue
            folder = self.remade / name
            folder.mkdir(parents=True)
            documents = self.clean_documents(name)
            jobs[name] = shard_jobs(self.cfg, name, self.listings[name], documents, folder)[:1]
        for name, (remade,) in executor.run("shards", jobs):
            first = [file for file in self.manifests[name].files() if "_00000." in file.name]
            if remade != [asdict(file) for file in first]:
                raise InputError(
                    f"shards of {name} differ from those that this config makes of its clean "
                    "documents, in data.seed, data.heldout_percent, tokenization or shuffling: "
                    f"{FIX}"
                )

    def clean_documents(self, name: str) -> CleanDocuments | None:
        """The clean documents of a source; None for a Megatron corpus."""
        if name not in self.built:
            return None
        built = self.built[name]
        folder = self.folder / "clean" / name
        return CleanDocuments(folder, sorted(built["files"]), built["steps"])

    def write(self) -> None:
        """Write new keys for every adopted source, and last for the tokenizer."""
        keys = {
            name: fingerprints.clean_key(self.cfg, name, self.listings[name])
            for name in self.cfg.sources
        }
        for name in self.cfg.sources:
            if name in self.skipped:
                logger.warning(f"{name} is not adopted: {self.skipped[name]}")
            else:
                self.write_source(name, keys[name])
        # a trained tokenizer also depends on the text of skipped sources
        if self.cfg.tokenizer.path is not None or not self.skipped:
            key = fingerprints.tokenizer_key(self.cfg, list(keys.values()))
            sha256 = sha256_of(self.tokenizer_file)
            fingerprints.write_built(self.tokenizer_file.parent, key, sha256=sha256)
            logger.info("adopted    the tokenizer")
        if self.skipped:
            replaced = (
                "them"
                if self.cfg.tokenizer.path is not None
                else "them, the tokenizer and therefore all shards"
            )
            logger.info(
                f"training can still read {', '.join(self.skipped)}; prepare.rebuild=true "
                f"replaces {replaced}"
            )

    def write_source(self, name: str, key: str) -> None:
        """Write the records of one source with keys of this version."""
        source, listing = self.cfg.sources[name], self.listings[name]
        if name in self.built:
            fingerprints.write_built(
                self.folder / "clean" / name,
                key,
                files=self.built[name]["files"],
                steps=[asdict(step) for step in self.built[name]["steps"]],
                **fingerprints.provenance(source, listing),
            )
        manifest = replace(
            self.manifests[name],
            recipe_sha256=fingerprints.recipe_sha256(self.cfg, name, listing),
            versions=fingerprints.shard_versions(source),
        )
        write_manifest(source_folder(self.cfg, name), manifest)
        fingerprints.pin_num_tasks(self.folder, name, source.tasks)
        logger.info(f"adopted    {name}: {manifest.tokens('train'):,} train tokens")


def adopt(cfg: DataConfig, executor_config: ExecutorConfig | None = None) -> None:
    """Write keys of this version into a prepared folder, so that `prepare` reuses it.

    Logs the sources that cannot be adopted and leaves them unchanged. Raises InputError, with
    nothing changed, if a record contradicts the config or a shard is damaged.
    """
    if not Path(cfg.folder).is_dir():
        raise InputError(f"folder {cfg.folder} does not exist: set data.folder")
    with lock_folder(Path(cfg.folder)):
        adoption = Adoption(cfg, executor_config)
        adoption.check()
        adoption.write()
