"""Taking over a folder that an earlier version prepared: its keys are written anew, its shards stay
as they are.

Keys once held the text of our own Python files, which no later version can know. What shows how a
source was made is compared with the config: its records, its input, its passes, its vocabulary.
Every shard is hashed, and those of the first task are made again from the clean documents and must
have the same bytes, which shows seed, held-out share and order. Taken on trust is what leaves no
trace: the content of input files and assets, and in records before 0.2 the input's sizes,
`text_key` and how far passes went (14x8 or 93x15, 50 tokens or 100).
"""

import logging
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import read_json, sha256_of
from data import recipes, tokenizer
from data.config import DataConfig, ExecutorConfig
from data.pipeline import fingerprints
from data.pipeline.accounting import Step
from data.pipeline.executors import Tasks, open_executor
from data.pipeline.fingerprints import Listing
from data.pipeline.shard import Clean
from data.pipeline.shard_jobs import shard_jobs
from data.pipeline.workers import exclusive
from data.recipes.readers import INPUT_LIST
from data.stream.documents import document_ends
from data.stream.manifests import (
    MANIFEST,
    Manifest,
    read_manifest,
    source_folder,
    tokenizer_path,
    write_manifest,
)

logger = logging.getLogger(__name__)

PASSES = {
    "near_duplicates": "Near duplicates",
    "exact_substrings": "Exact substrings",
    "replace_pii": "PII",
    "decontaminate": "Decontamination",
}
FIX = "give the config that it was prepared with"


class Adoption:
    """One take-over of a folder: everything is checked before anything is written."""

    def __init__(self, cfg: DataConfig, executor: ExecutorConfig | None) -> None:
        self.cfg, self.executor = cfg, executor
        self.folder = Path(cfg.folder)
        self.again = self.folder / "building" / "adopt"  # shards for comparison
        self.file = tokenizer_path(cfg)
        self.listings: dict[str, Listing] = {}
        self.manifests: dict[str, Manifest] = {}
        self.built: dict[str, dict[str, Any]] = {}  # records of clean documents, by source
        self.left: dict[str, str] = {}  # why a source is not taken over

    def check(self) -> None:
        """Raise InputError where a record contradicts the config or a shard is another."""
        self.check_vocabulary()
        for name, source in self.cfg.sources.items():
            self.listings[name] = fingerprints.list_input(source)
            if not (source_folder(self.cfg, name) / MANIFEST).is_file():
                self.left[name] = "it has no shards"
                continue
            self.manifests[name] = read_manifest(source_folder(self.cfg, name))
            self.check_manifest(name)
            if source.recipe != recipes.MEGATRON:
                self.check_clean(name)
        taken = [name for name in self.cfg.sources if name not in self.left]
        try:
            with closing(open_executor(self.executor, self.cfg.workers, self.folder)) as workers:
                self.check_hashes(workers)
                self.make_again(workers, taken)
        finally:
            fingerprints.discard(self.again)

    def check_vocabulary(self) -> None:
        """The vocabulary is the one that the config names, or of the size that it trains."""
        settings, size = self.cfg.tokenizer, tokenizer.size_of(tokenizer.load(self.file))
        if settings.path is not None and sha256_of(Path(settings.path)) != sha256_of(self.file):
            raise InputError(
                f"{self.file} is another vocabulary than data.tokenizer.path, {settings.path}: "
                f"{FIX}"
            )
        if settings.path is None and size != settings.vocab_size:
            raise InputError(
                f"{self.file} has {size} ids, data.tokenizer.vocab_size is "
                f"{settings.vocab_size}: {FIX}"
            )

    def check_manifest(self, name: str) -> None:
        """Shards are of this recipe, licence, vocabulary and number of tasks, and whole."""
        source, manifest = self.cfg.sources[name], self.manifests[name]
        fingerprints.check_tasks(self.folder, name, source.tasks)
        recorded = {
            "recipe": manifest.recipe,
            "licence": manifest.licence,
            "vocabulary": manifest.tokenizer_sha256,
        }
        wanted = {
            "recipe": source.recipe,
            "licence": source.licence,
            "vocabulary": sha256_of(self.file),
        }
        if other := [
            f"{key} {recorded[key]}, not {wanted[key]}"
            for key in wanted
            if recorded[key] != wanted[key]
        ]:
            raise InputError(f"shards of {name} have {'; '.join(other)}: {FIX}")
        for file in manifest.files():
            document_ends(source_folder(self.cfg, name), file)
        self.check_versions(name, manifest.versions, fingerprints.shard_versions(source))

    def check_clean(self, name: str) -> None:
        """Check that clean documents are the shards', of this input, these passes and versions."""
        source, folder = self.cfg.sources[name], self.folder / "clean" / name
        if not (folder / fingerprints.BUILT).is_file():
            self.left[name] = (
                "its clean documents are not there, and nothing else shows how they were made"
            )
            return
        built, pinned = read_json(folder / fingerprints.BUILT), read_json(folder / INPUT_LIST)
        try:
            files, documents = built["files"], built["steps"][-1]["forwarded"]
            names = {step["name"] for step in built["steps"]}
            read = [pinned["kind"], sorted(pinned["files"])]
            before = built.get("settings", {})
            sizes = built.get("input", [None, None])[1]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{folder} has a damaged {fingerprints.BUILT} or {INPUT_LIST}: remove {folder}"
            ) from error
        if files != fingerprints.sizes(folder):
            raise InputError(f"{folder} holds other files than were written there: remove it")
        kind, listed = self.listings[name]
        if read != [kind, sorted(listed)] or sizes not in (
            None,
            {file: size for file, (size, _) in listed.items()},
        ):
            raise InputError(
                f"{folder} was made from other input files than {source.input} holds: {FIX}"
            )
        sharded = sum(file.documents for file in self.manifests[name].files())
        if documents != sharded:
            raise InputError(f"{folder} has {documents} documents, its shards {sharded}: {FIX}")
        for setting, step in PASSES.items():
            if bool(getattr(source, setting)) != (step in names):
                raise InputError(
                    f"{folder} was made with{'' if step in names else 'out'} {setting}: {FIX}"
                )
        now = fingerprints.shaping(source)
        if other := [
            f"{key} {before[key]}, not {now[key]}" for key in before if before[key] != now.get(key)
        ]:
            raise InputError(f"{folder} was made with {'; '.join(other)}: {FIX}")
        self.built[name] = built
        self.check_versions(name, built.get("versions", {}), fingerprints.versions_of(source))

    def check_versions(
        self, name: str, before: dict[str, str | int], now: dict[str, str | int]
    ) -> None:
        """Leave out text made by other rules; for other package versions, only warn."""
        ours = {key for key, value in now.items() if isinstance(value, int)}
        before = before or dict.fromkeys(ours, 1)  # they began at 1, and unrecorded
        if rules := [
            f"{key} {before.get(key)}, now {now[key]}"
            for key in sorted(ours)
            if before.get(key) != now[key]
        ]:
            self.left[name] = f"it was made by another version of its rules ({', '.join(rules)})"
        packages = [
            f"{key} {before[key]}, now {now[key]}"
            for key in now.keys() & before.keys() - ours
            if before[key] != now[key]
        ]
        if packages:
            logger.warning(
                f"{name} was made by {', '.join(sorted(packages))}: taken for the same text"
            )

    def check_hashes(self, workers: Tasks) -> None:
        """Hash every shard where `prepare` would work."""
        places = {
            name: [source_folder(self.cfg, name) / file.name for file in manifest.files()]
            for name, manifest in self.manifests.items()
        }
        jobs = {name: [(sha256_of, path) for path in places[name]] for name in places}
        for name, found in workers.run("hash", jobs):
            files = self.manifests[name].files()
            for path, file, sha256 in zip(places[name], files, found, strict=True):
                if sha256 != file.sha256:
                    raise InputError(
                        f"shard {path} does not hash to its manifest's SHA-256: prepare its "
                        "source again"
                    )

    def make_again(self, workers: Tasks, taken: list[str]) -> None:
        """Tokenize the first task of every source once more, beside the folder's shards."""
        fingerprints.discard(self.again)
        jobs = {}
        for name in taken:
            place = self.again / name
            place.mkdir(parents=True)
            jobs[name] = shard_jobs(
                self.cfg, name, self.listings[name], self.clean_of(name), place
            )[:1]
        for name, (made,) in workers.run("shards", jobs):
            first = [file for file in self.manifests[name].files() if "_00000." in file.name]
            if made != [asdict(file) for file in first]:
                raise InputError(
                    f"shards of {name} are not those that this config makes of its clean "
                    "documents: seed, heldout_percent, or what tokenizes and shuffles is "
                    f"another; {FIX}"
                )

    def clean_of(self, name: str) -> Clean | None:
        """The clean documents of a source that has some."""
        if name not in self.built:
            return None
        built = self.built[name]
        steps = [Step(**step) for step in built["steps"]]
        return Clean(self.folder / "clean" / name, sorted(built["files"]), steps)

    def write(self) -> None:
        """Key what was found right, the vocabulary last."""
        keys = {
            name: fingerprints.clean_key(self.cfg, name, self.listings[name])
            for name in self.cfg.sources
        }
        for name, source in self.cfg.sources.items():
            if name in self.left:
                logger.warning(f"{name} is left as it is, for {self.left[name]}")
                continue
            if name in self.built:
                kept = {key: self.built[name][key] for key in ("files", "steps")}
                made_of = fingerprints.made_of(source, self.listings[name])
                fingerprints.write_built(
                    self.folder / "clean" / name, keys[name], **kept, **made_of
                )
            manifest = replace(
                self.manifests[name],
                recipe_sha256=fingerprints.recipe_sha256(self.cfg, name, self.listings[name]),
                versions=fingerprints.shard_versions(source),
            )
            write_manifest(source_folder(self.cfg, name), manifest)
            fingerprints.pin_tasks(self.folder, name, source.tasks)
            logger.info(f"adopted    {name}: {manifest.tokens('train'):,} train tokens")
        # else it was trained on other text
        if self.cfg.tokenizer.path is not None or not self.left:
            key = fingerprints.tokenizer_key(self.cfg, list(keys.values()))
            fingerprints.write_built(self.file.parent, key, sha256=sha256_of(self.file))
            logger.info("adopted    the vocabulary")
        if self.left:
            what = (
                "them"
                if self.cfg.tokenizer.path is not None
                else "them, the vocabulary and with it all shards"
            )
            logger.info(
                f"training reads {', '.join(self.left)} as before; prepare.rebuild=true would "
                f"replace {what}"
            )


def adopt(cfg: DataConfig, executor: ExecutorConfig | None = None) -> None:
    """Make a prepared folder one that `prepare` reuses; sources that cannot be are named and left.

    Raises InputError, with no record and no shard changed, where one contradicts the config or is
    damaged.
    """
    if not Path(cfg.folder).is_dir():
        raise InputError(f"there is no folder {cfg.folder} to adopt: set data.folder")
    with exclusive(Path(cfg.folder)):
        adoption = Adoption(cfg, executor)
        adoption.check()
        adoption.write()
