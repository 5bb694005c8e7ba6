"""Build the data that a config describes: raw text -> clean documents -> vocabulary -> token
shards.

Stages that are complete are reused; a killed run is taken up where it was.

examples:
  python data/prepare.py +experiment=demo
  python data/prepare.py +experiment=7b executor=slurm executor.partition=cpu
  python data/prepare.py +experiment=7b prepare.adopt=true    # keep what an earlier version made
"""

import logging
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from core.command import command
from core.errors import InputError
from core.files import read_json, sha256_of, write_json
from data import recipes, tokenizer
from data.config import DataConfig, ExecutorConfig, PrepareConfig
from data.pipeline import accounting, clean, fingerprints, megatron, shard
from data.pipeline.accounting import Step
from data.pipeline.adoption import adopt
from data.pipeline.clean import Build
from data.pipeline.executors import Tasks, open_executor
from data.pipeline.shard import Clean
from data.pipeline.shard_jobs import shard_jobs
from data.pipeline.workers import exclusive
from data.recipes.readers import pin_files
from data.stream.manifests import (
    MANIFEST,
    SPLITS,
    Manifest,
    ShardFile,
    read_manifest,
    source_folder,
    write_manifest,
)

logger = logging.getLogger(__name__)

REPORT = "report.json"


class Preparation:
    """One run over a data folder; the three stages are called in order."""

    def __init__(self, cfg: DataConfig, workers: Tasks, rebuild: bool) -> None:
        self.cfg = cfg
        self.workers = workers
        self.folder = Path(cfg.folder)
        self.started = time.monotonic()
        self.steps: dict[str, list[Step]] = {}
        self.cleans: dict[str, Clean] = {}
        self.manifests: dict[str, Manifest] = {}
        self.report("prepare", f"{', '.join(cfg.sources)} into {self.folder}, {workers.describe()}")
        for name, source in cfg.sources.items():
            recipes.check_known(source.recipe)
            fingerprints.check_tasks(self.folder, name, source.tasks)
        self.listings = {
            name: fingerprints.list_input(source) for name, source in cfg.sources.items()
        }
        self.keys = {
            name: fingerprints.clean_key(cfg, name, self.listings[name]) for name in cfg.sources
        }
        if not rebuild:
            self.check_versions()

    def report(self, stage: str, line: str) -> None:
        """One line of progress with the seconds since the start."""
        logger.info(f"{stage:<10} {line}  ({time.monotonic() - self.started:.1f} s)")

    def check_versions(self) -> None:
        """Raise InputError where finished data would be replaced because something has another
        version.

        Another config is what somebody wants; an upgrade would take weeks of work with it unseen.
        """
        found = []
        for name, source in self.cfg.sources.items():
            built = read_json(self.folder / "clean" / name / fingerprints.BUILT)
            manifest = read_json(source_folder(self.cfg, name) / MANIFEST)
            why = []
            if built and built.get("key") != self.keys[name]:
                why.append(
                    fingerprints.changes(
                        built.get("versions", {}), fingerprints.versions_of(source)
                    )
                )
            if manifest:
                why.append(
                    fingerprints.changes(
                        manifest.get("versions", {}), fingerprints.shard_versions(source)
                    )
                )
            if named := dict.fromkeys(filter(None, why)):
                found.append(f"{name} by {', '.join(named)}")
        if found:
            raise InputError(
                f"finished data was made by other versions: {'; '.join(found)}. Add "
                "prepare.adopt=true to keep it, prepare.rebuild=true to have it replaced"
            )

    def place(self, name: str) -> Path:
        """The folder in which a source's clean documents are built."""
        return fingerprints.construction(self.folder, f"clean/{name}", self.keys[name])

    def clean(self) -> None:
        """Clean every source whose documents are not there yet, pass by pass."""
        builds = {}
        for name, source in self.cfg.sources.items():
            if source.recipe == recipes.MEGATRON:
                continue
            if self.read_clean(name):
                self.report("clean", f"{name}: reused, {self.cleans[name].documents:,} documents")
                continue
            # imports before the fork, and refuses before the first document
            clean.check_packages(source)
            builds[name] = Build(
                source, self.cfg.assets, self.place(name), self.cfg.keep_exclusions
            )
        for name, build in builds.items():
            fingerprints.pin_tasks(self.folder, name, build.source.tasks)
            kind, files = self.listings[name]
            pin_files(build.place, kind, list(files))
            preload = getattr(recipes.load(build.source.recipe), "preload", None)
            if preload is not None:
                preload(build.source, self.cfg.assets)
        chains = {name: clean.passes(build) for name, build in builds.items()}
        for number in range(max(map(len, chains.values()), default=0)):
            now = {name: chain[number] for name, chain in chains.items() if number < len(chain)}

            def ended(name: str, results: list[Any], number: int = number) -> None:
                if number == len(chains[name]) - 1:
                    self.finish_clean(name, builds[name])

            stage = "/".join(dict.fromkeys(one.name for one in now.values()))
            self.workers.run(stage, {name: one.jobs() for name, one in now.items()}, ended)

    def read_clean(self, name: str) -> bool:
        """Take up the finished clean documents of a source, if their files are the ones that were
        written.
        """
        folder = self.folder / "clean" / name
        built = fingerprints.read_built(folder, self.keys[name])
        if built is None or built["files"] != fingerprints.sizes(folder):
            return False
        self.steps[name] = [Step(**step) for step in built["steps"]]
        self.cleans[name] = Clean(folder, sorted(built["files"]), self.steps[name][-1].forwarded)
        return True

    def finish_clean(self, name: str, build: Build) -> None:
        """Account for the documents and move the folder into place; shards made of older documents
        go first.
        """
        place = build.place
        steps = clean.count(build)
        try:
            accounting.check_yield(name, steps, build.source.min_yield)
            if not steps[-1].forwarded:
                raise InputError(
                    f"source {name}: no document of {steps[0].total} was kept "
                    f"({accounting.reasons(steps)})"
                )
        except (RuntimeError, InputError) as error:
            # its tasks are marked complete, and a next run would believe them
            fingerprints.discard(place)
            raise InputError(str(error)) from error
        clean.finish(build)
        made_of = fingerprints.made_of(build.source, self.listings[name])
        files = fingerprints.sizes(place)
        fingerprints.write_built(
            place, self.keys[name], files=files, steps=[asdict(step) for step in steps], **made_of
        )
        fingerprints.discard(self.folder / "shards" / name)
        fingerprints.discard(self.folder / "building" / "shards" / name)
        fingerprints.install(place, self.folder / "clean" / name)
        assert self.read_clean(name)
        dropped = steps[0].total - steps[-1].forwarded
        self.report(
            "clean",
            f"{name}: {steps[0].total:,} in, {dropped:,} dropped, {steps[-1].forwarded:,} out",
        )

    def vocabulary(self) -> None:
        """Train the vocabulary, or copy the one that the config names."""
        settings = self.cfg.tokenizer
        if settings.path is not None:
            tokenizer.load(Path(settings.path), settings.sha256)
        key = fingerprints.tokenizer_key(self.cfg, list(self.keys.values()))
        folder = self.folder / "tokenizer"
        built = fingerprints.read_built(folder, key)
        file = folder / tokenizer.FILE
        if built is not None and file.is_file() and sha256_of(file) == built["sha256"]:
            self.report("tokenizer", f"reused, {built['sha256'][:12]}")
            return
        place = fingerprints.construction(self.folder, "tokenizer", key)
        if settings.path is not None:
            tokenizer.adopt(Path(settings.path), settings.sha256, settings.vocab_size, place)
        else:
            # not as they ended
            cleans = [self.cleans[name] for name in self.cfg.sources if name in self.cleans]
            if not cleans:
                raise InputError(
                    "no source has text to train a vocabulary on: set data.tokenizer.path"
                )
            arguments = (
                self.cfg.heldout_percent,
                settings.train_megabytes * 10**6,
                settings.vocab_size,
                place,
            )
            self.workers.run(
                "tokenizer",
                {"train": [(shard.tokenizer_task, cleans, *arguments)]},
                lambda *_: None,
            )
        sha256 = sha256_of(place / tokenizer.FILE)
        fingerprints.write_built(place, key, sha256=sha256)
        fingerprints.install(place, folder)
        size = tokenizer.load(file).get_vocab_size()
        self.report(
            "tokenizer",
            f"{'trained' if settings.path is None else 'copied'}, {size:,} ids, {sha256[:12]}",
        )

    def shards(self) -> None:
        """Tokenize every source whose shards are not there yet."""
        cfg, file = self.cfg, self.folder / "tokenizer" / tokenizer.FILE
        wanted = {name: self.manifest_of(name, sha256_of(file)) for name in cfg.sources}
        verifying = {
            name: [(fingerprints.same_shards, self.folder / "shards" / name, wanted[name])]
            for name in wanted
        }
        self.workers.run("verify", verifying, self.take_up)
        jobs: dict[str, list[Any]] = {}
        for name in (name for name in cfg.sources if name not in self.manifests):
            place = fingerprints.construction(
                self.folder, f"shards/{name}", fingerprints.shards_key(wanted[name])
            )
            if name not in self.cleans:
                fingerprints.pin_tasks(self.folder, name, cfg.sources[name].tasks)
            jobs[name] = shard_jobs(cfg, name, self.listings[name], self.cleans.get(name), place)

        def finish(name: str, results: list[list[dict[str, Any]]]) -> None:
            self.finish_shards(
                name, wanted[name], [ShardFile(**file) for files in results for file in files]
            )

        self.workers.run("shards", jobs, finish)

    def manifest_of(self, name: str, tokenizer_sha256: str) -> Manifest:
        """The manifest that a source's shards must have, without its files."""
        source = self.cfg.sources[name]
        size = tokenizer.size_of(tokenizer.load(self.folder / "tokenizer" / tokenizer.FILE))
        recipe = fingerprints.recipe_sha256(self.cfg, name, self.listings[name])
        splits: dict[str, list[ShardFile]] = {split: [] for split in SPLITS}
        versions = fingerprints.shard_versions(source)
        return Manifest(
            name,
            source.licence,
            source.recipe,
            recipe,
            tokenizer_sha256,
            tokenizer.EOS,
            size,
            splits,
            versions,
        )

    def take_up(self, name: str, results: list[bool]) -> None:
        """Keep the manifest of shards that were found complete."""
        if results[0]:
            manifest = self.manifests[name] = read_manifest(self.folder / "shards" / name)
            if self.cfg.sources[name].recipe == recipes.MEGATRON:
                self.steps[name] = [megatron.step(manifest)]
            self.report(
                "shards",
                f"{name}: reused, {sum(manifest.tokens(split) for split in SPLITS):,} tokens",
            )

    def finish_shards(self, name: str, wanted: Manifest, results: list[ShardFile]) -> None:
        """Write the manifest and move the shards into place; every clean document is in exactly one
        split.
        """
        splits = {
            split: [file for file in results if file.name.startswith(split)] for split in SPLITS
        }
        documents = sum(file.documents for file in results)
        if name in self.cleans:
            expected = self.cleans[name].documents
            assert documents == expected, f"{name}: {documents} of {expected} documents in shards"
        for split in SPLITS:
            if not splits[split]:
                raise InputError(
                    f"source {name}: no document of {documents} fell into the split {split}; "
                    "give it more documents or set data.heldout_percent, now "
                    f"{self.cfg.heldout_percent}"
                )
        manifest = replace(wanted, splits=splits)
        place = fingerprints.construction(
            self.folder, f"shards/{name}", fingerprints.shards_key(wanted)
        )
        write_manifest(place, manifest)
        fingerprints.install(place, self.folder / "shards" / name)
        self.manifests[name] = manifest
        if name not in self.cleans:
            self.steps[name] = [megatron.step(manifest)]
        self.report(
            "shards",
            f"{name}: {manifest.tokens('train'):,} train and {manifest.tokens('heldout'):,} held "
            "out",
        )

    def table(self) -> None:
        """What became of every source's documents, step by step; the same is written to
        report.json.
        """
        steps = {name: self.steps[name] for name in self.cfg.sources}
        print("\n" + "\n".join(accounting.table(steps)))
        print(f"\n{'source':<14}{'documents':>12}{'train tokens':>18}{'held out':>14}{'bytes':>18}")
        for name in self.cfg.sources:
            train, heldout = (self.manifests[name].tokens(split) for split in SPLITS)
            documents = self.steps[name][-1].forwarded
            print(
                f"{name:<14}{documents:>12,}{train:>18,}{heldout:>14,}{2 * (train + heldout):>18,}"
            )
        record = {name: [asdict(step) for step in found] for name, found in steps.items()}
        write_json(self.folder / REPORT, {"steps": record})
        logger.info(f"done in {time.monotonic() - self.started:.1f} s: {self.folder / 'shards'}")


def prepare(
    cfg: DataConfig, executor: ExecutorConfig | None = None, *, rebuild: bool = False
) -> None:
    """Build everything under `cfg.folder`, with processes of this machine unless `executor` says
    otherwise.

    Finished data that other versions made is replaced only to `rebuild`. Raises InputError for what
    the user can mend.
    """
    with exclusive(Path(cfg.folder)):
        workers = open_executor(executor, cfg.workers, Path(cfg.folder))
        try:
            preparation = Preparation(cfg, workers, rebuild)
            preparation.clean()
            preparation.vocabulary()
            preparation.shards()
            preparation.table()
        finally:
            workers.close()


@command(PrepareConfig)
def main(cfg: PrepareConfig) -> None:
    """Prepare the data of a composed config, or take over what is there and do no more."""
    if cfg.prepare.adopt:
        adopt(cfg.data, cfg.executor)
    else:
        prepare(cfg.data, cfg.executor, rebuild=cfg.prepare.rebuild)


if __name__ == "__main__":
    main()
