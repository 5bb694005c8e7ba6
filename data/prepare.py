"""Build the data that a config describes: raw text -> clean documents -> vocabulary -> token shards.

`python data/prepare.py +experiment=demo`. Stages that are complete are reused; a killed run is taken up where it was.
"""

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data import fingerprints, pipelines, recipes, tokenizer
from data.command import command
from data.config import DataConfig, InputError
from data.counts import Step, check_yield, read_counts, reasons
from data.pipelines import Clean, Sharding
from data.recipes.readers import pin_files
from data.shards import SPLITS, Manifest, ShardFile, sha256_of, write_manifest
from data.workers import Workers, exclusive


@dataclass
class PrepareConfig:
    """The section of the config that this program reads."""

    data: DataConfig


class Preparation:
    """One run over a data folder; the three stages are called in order."""

    def __init__(self, cfg: DataConfig, workers: Workers) -> None:
        self.cfg = cfg
        self.workers = workers
        self.folder = Path(cfg.folder)
        self.started = time.monotonic()
        self.listings = {name: fingerprints.list_input(source) for name, source in cfg.sources.items()}
        self.keys = {name: fingerprints.clean_key(source, self.listings[name]) for name, source in cfg.sources.items()}
        self.steps: dict[str, list[Step]] = {}
        self.cleans: dict[str, Clean] = {}
        self.manifests: dict[str, Manifest] = {}
        self.report("prepare", f"{', '.join(cfg.sources)} into {self.folder}, {cfg.workers} workers")

    def report(self, stage: str, line: str) -> None:
        """One line of progress with the seconds since the start."""
        print(f"{stage:<10} {line}  ({time.monotonic() - self.started:.1f} s)", flush=True)

    def clean(self) -> None:
        """Clean every source whose documents are not there yet."""
        jobs = {}
        for name, source in self.cfg.sources.items():
            if self.read_clean(name):
                self.report("clean", f"{name}: reused, {self.cleans[name].documents:,} documents")
                continue
            recipes.load(source.recipe)  # imports before the fork, and refuses before the first document
            place = fingerprints.construction(self.folder, f"clean/{name}", self.keys[name])
            if (listing := self.listings[name]) is not None:
                pin_files(place, listing[0], list(listing[1]))
            jobs[name] = [(pipelines.clean_task, source, place, rank) for rank in range(source.tasks)]
        self.workers.run("clean", jobs, self.finish_clean)

    def read_clean(self, name: str) -> bool:
        """Take up the finished clean documents of a source, if their files are the ones that were written."""
        folder = self.folder / "clean" / name
        built = fingerprints.read_built(folder, self.keys[name])
        if built is None or built["files"] != sizes(folder):
            return False
        self.steps[name] = [Step(**step) for step in built["steps"]]
        self.cleans[name] = Clean(folder, sorted(built["files"]), self.steps[name][-1].forwarded)
        return True

    def finish_clean(self, name: str, results: list[Any]) -> None:
        """Account for the documents and move the folder into place; shards made of older documents go first."""
        place = fingerprints.construction(self.folder, f"clean/{name}", self.keys[name])
        steps = read_counts(place / "datatrove" / "stats", self.cfg.sources[name].tasks)
        try:
            check_yield(name, steps)
            if not steps[-1].forwarded:
                raise InputError(f"source {name}: no document of {steps[0].total} was kept ({reasons(steps)})")
        except (RuntimeError, InputError):
            fingerprints.discard(place)  # its tasks are marked complete, and a next run would believe them
            raise
        fingerprints.write_built(place, self.keys[name], files=sizes(place), steps=[asdict(step) for step in steps])
        fingerprints.discard(self.folder / "shards" / name)
        fingerprints.discard(self.folder / "building" / "shards" / name)
        fingerprints.install(place, self.folder / "clean" / name)
        assert self.read_clean(name)
        dropped = steps[0].total - steps[-1].forwarded
        self.report("clean", f"{name}: {steps[0].total:,} in, {dropped:,} dropped, {steps[-1].forwarded:,} out")

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
            cleans = [self.cleans[name] for name in self.cfg.sources]  # not in the order in which they ended
            arguments = (self.cfg.heldout_percent, settings.train_megabytes * 10**6, settings.vocab_size, place)
            self.workers.run("tokenizer", {"train": [(pipelines.tokenizer_task, cleans, *arguments)]}, lambda *_: None)
        sha256 = sha256_of(place / tokenizer.FILE)
        fingerprints.write_built(place, key, sha256=sha256)
        fingerprints.install(place, folder)
        size = tokenizer.load(file).get_vocab_size()
        self.report("tokenizer", f"{'trained' if settings.path is None else 'copied'}, {size:,} ids, {sha256[:12]}")

    def shards(self) -> None:
        """Tokenize every source whose shards are not there yet."""
        cfg, file = self.cfg, self.folder / "tokenizer" / tokenizer.FILE
        wanted = {name: self.manifest_of(name, sha256_of(file)) for name in cfg.sources}
        verifying = {name: [(fingerprints.same_shards, self.folder / "shards" / name, wanted[name])] for name in wanted}
        self.workers.run("verify", verifying, self.take_up)
        jobs = {}
        for name in (name for name in cfg.sources if name not in self.manifests):
            place = fingerprints.construction(self.folder, f"shards/{name}", fingerprints.shards_key(wanted[name]))
            tasks = cfg.sources[name].tasks
            sharding = Sharding(self.cleans[name], place, file, cfg.seed, cfg.heldout_percent, tasks)
            jobs[name] = [(pipelines.shard_task, sharding, split, rank) for split in SPLITS for rank in range(tasks)]

        def finish(name: str, results: list[ShardFile | None]) -> None:
            self.finish_shards(name, wanted[name], results)

        self.workers.run("shards", jobs, finish)

    def manifest_of(self, name: str, tokenizer_sha256: str) -> Manifest:
        """The manifest that a source's shards must have, without its files."""
        source = self.cfg.sources[name]
        size = tokenizer.size_of(tokenizer.load(self.folder / "tokenizer" / tokenizer.FILE))
        recipe = fingerprints.recipe_sha256(self.cfg, source, self.listings[name])
        splits: dict[str, list[ShardFile]] = {split: [] for split in SPLITS}
        return Manifest(name, source.licence, source.recipe, recipe, tokenizer_sha256, tokenizer.EOS, size, splits)

    def take_up(self, name: str, results: list[Manifest | None]) -> None:
        """Keep the manifest of shards that were found complete."""
        if results[0] is not None:
            self.manifests[name] = results[0]
            self.report("shards", f"{name}: reused, {sum(results[0].tokens(split) for split in SPLITS):,} tokens")

    def finish_shards(self, name: str, wanted: Manifest, results: list[ShardFile | None]) -> None:
        """Write the manifest and move the shards into place; every clean document is in exactly one split."""
        splits = {split: [file for file in results if file and file.name.startswith(split)] for split in SPLITS}
        documents = sum(file.documents for files in splits.values() for file in files)
        assert documents == self.cleans[name].documents, (
            f"{name}: {documents} of {self.cleans[name].documents} in shards"
        )
        for split in SPLITS:
            if not splits[split]:
                raise InputError(
                    f"source {name}: no document of {documents} fell into the split {split}; give it more documents or "
                    f"set data.heldout_percent, now {self.cfg.heldout_percent}"
                )
        manifest = replace(wanted, splits=splits)
        place = fingerprints.construction(self.folder, f"shards/{name}", fingerprints.shards_key(wanted))
        write_manifest(place, manifest)
        fingerprints.install(place, self.folder / "shards" / name)
        self.manifests[name] = manifest
        self.report("shards", f"{name}: {manifest.tokens('train'):,} train and {manifest.tokens('heldout'):,} held out")

    def table(self) -> None:
        """What became of every source's documents."""
        print(f"\n{'source':<12}{'in':>9}{'dropped':>9}{'out':>9}{'train tokens':>15}{'held out':>11}{'bytes':>13}")
        for name in self.cfg.sources:
            steps = self.steps[name]
            manifest, out = self.manifests[name], steps[-1].forwarded
            train, heldout = (manifest.tokens(split) for split in SPLITS)
            print(
                f"{name:<12}{steps[0].total:>9,}{steps[0].total - out:>9,}{out:>9,}{train:>15,}{heldout:>11,}"
                f"{2 * (train + heldout):>13,}"
            )
        for name in self.cfg.sources:
            if why := reasons(self.steps[name]):
                print(f"dropped from {name}: {why}")
        print(f"done in {time.monotonic() - self.started:.1f} s: {self.folder / 'shards'}", flush=True)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the clean documents' files in a folder."""
    return {path.name: path.stat().st_size for path in folder.glob("*.jsonl.gz")}


def prepare(cfg: DataConfig) -> None:
    """Build everything under `cfg.folder`; raises InputError for what the user can mend."""
    with exclusive(Path(cfg.folder)):
        workers = Workers(cfg.workers, Path(cfg.folder))
        try:
            preparation = Preparation(cfg, workers)
            preparation.clean()
            preparation.vocabulary()
            preparation.shards()
            preparation.table()
        finally:
            workers.close()


@command(PrepareConfig)
def main(cfg: PrepareConfig) -> None:
    """Prepare the data of a composed config."""
    prepare(cfg.data)


if __name__ == "__main__":
    main()
