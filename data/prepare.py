"""Build the data that a config describes: raw text -> clean documents -> vocabulary -> token
shards.

Stages that are complete are reused; a killed run is taken up where it was.

examples:
  python data/prepare.py +experiment=demo
  python data/prepare.py +experiment=7b executor=slurm executor.partition=cpu
  python data/prepare.py +experiment=7b prepare.adopt=true    # keep what an earlier version made
"""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
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
from data.pipeline.executors import Job, Tasks, open_executor
from data.pipeline.fingerprints import Listing
from data.pipeline.shard import Clean
from data.pipeline.shard_jobs import shard_jobs
from data.pipeline.workers import exclusive
from data.stream.manifests import (
    MANIFEST,
    SPLITS,
    Manifest,
    ShardFile,
    read_manifest,
    source_folder,
    tokenizer_path,
    write_manifest,
)

REPORT = "report.json"


@dataclass(frozen=True)
class Input:
    """What a source is made from, as it was found at the start: the whole build works from it."""

    listing: Listing
    key: str  # of the clean documents that follow from it


def prepare(
    cfg: DataConfig, executor: ExecutorConfig | None = None, *, rebuild: bool = False
) -> None:
    """Build everything under `cfg.folder`, with processes of this machine unless `executor` says
    otherwise.

    Finished data that other versions made is replaced only to `rebuild`. Raises InputError for what
    the user can mend.
    """
    folder = Path(cfg.folder)
    with exclusive(folder), closing(open_executor(executor, cfg.workers, folder)) as workers:
        workers.say("prepare", f"{', '.join(cfg.sources)} into {folder}, {workers.describe()}")
        inputs = list_inputs(cfg)
        if not rebuild:
            refuse_upgrades(cfg, inputs)
        cleans = clean_sources(cfg, inputs, workers)
        vocabulary = build_vocabulary(cfg, inputs, cleans, workers)
        manifests = build_shards(cfg, inputs, cleans, vocabulary, workers)
        report(cfg, cleans, manifests)
        workers.say("done", str(folder / "shards"))


def list_inputs(cfg: DataConfig) -> dict[str, Input]:
    """Files of every source's input and their keys; raises InputError before any work begins."""
    for name, source in cfg.sources.items():
        recipes.check_known(source.recipe)
        fingerprints.check_tasks(Path(cfg.folder), name, source.tasks)
    listings = {name: fingerprints.list_input(source) for name, source in cfg.sources.items()}
    return {
        name: Input(listing, fingerprints.clean_key(cfg, name, listing))
        for name, listing in listings.items()
    }


def refuse_upgrades(cfg: DataConfig, inputs: dict[str, Input]) -> None:
    """Raise InputError where finished data would be replaced because something has another version.

    Another config is what somebody wants; an upgrade would take weeks of work with it unseen.
    """
    found = []
    for name, source in cfg.sources.items():
        built = read_json(Path(cfg.folder) / "clean" / name / fingerprints.BUILT)
        manifest = read_json(source_folder(cfg, name) / MANIFEST)
        why = []
        if built and built.get("key") != inputs[name].key:
            now = fingerprints.versions_of(source)
            why.append(fingerprints.changes(built.get("versions", {}), now))
        if manifest:
            now = fingerprints.shard_versions(source)
            why.append(fingerprints.changes(manifest.get("versions", {}), now))
        if named := dict.fromkeys(filter(None, why)):
            found.append(f"{name} by {', '.join(named)}")
    if found:
        raise InputError(
            f"finished data was made by other versions: {'; '.join(found)}. Add "
            "prepare.adopt=true to keep it, prepare.rebuild=true to have it replaced"
        )


def clean_sources(cfg: DataConfig, inputs: dict[str, Input], workers: Tasks) -> dict[str, Clean]:
    """Clean documents of every source that has raw text, made where they are not there yet."""
    cleans: dict[str, Clean] = {}
    builds: dict[str, Build] = {}
    for name, source in cfg.sources.items():
        if source.recipe == recipes.MEGATRON:
            continue
        if found := read_clean(cfg, name, inputs[name]):
            cleans[name] = found
            workers.say("clean", f"{name}: reused, {found.documents:,} documents")
            continue
        # imports before the fork, and refuses before the first document
        clean.check_packages(source)
        place = fingerprints.construction(Path(cfg.folder), f"clean/{name}", inputs[name].key)
        builds[name] = Build(source, cfg.assets, place, cfg.keep_exclusions)
    for name, build in builds.items():
        fingerprints.pin_tasks(Path(cfg.folder), name, build.source.tasks)
        clean.begin(build, *inputs[name].listing)
    for name in run_passes(builds, workers):
        cleans[name] = finish_clean(cfg, name, inputs[name], builds[name], workers)
    return {name: cleans[name] for name in cfg.sources if name in cleans}  # not as they ended


def read_clean(cfg: DataConfig, name: str, given: Input) -> Clean | None:
    """The finished clean documents of a source, if their files are the ones that were written."""
    folder = Path(cfg.folder) / "clean" / name
    built = fingerprints.read_built(folder, given.key)
    if built is None or built["files"] != fingerprints.sizes(folder):
        return None
    return Clean(folder, sorted(built["files"]), [Step(**step) for step in built["steps"]])


def run_passes(builds: dict[str, Build], workers: Tasks) -> Iterator[str]:
    """Run the passes of all sources, the n-th of all at once; yields a source after its last."""
    chains = {name: clean.passes(build) for name, build in builds.items()}
    for number in range(max(map(len, chains.values()), default=0)):
        now = {name: chain[number] for name, chain in chains.items() if number < len(chain)}
        stage = "/".join(dict.fromkeys(one.name for one in now.values()))
        for name, _ in workers.run(stage, {name: one.jobs() for name, one in now.items()}):
            if number == len(chains[name]) - 1:
                yield name


def finish_clean(cfg: DataConfig, name: str, given: Input, build: Build, workers: Tasks) -> Clean:
    """Account for the documents and move their folder into place; remove shards of older ones."""
    folder, place = Path(cfg.folder), build.place
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
    fingerprints.write_built(
        place,
        given.key,
        files=fingerprints.sizes(place),
        steps=[asdict(step) for step in steps],
        **fingerprints.made_of(build.source, given.listing),
    )
    fingerprints.discard(folder / "shards" / name)
    fingerprints.discard(folder / "building" / "shards" / name)
    fingerprints.install(place, folder / "clean" / name)
    found = read_clean(cfg, name, given)
    assert found is not None
    total, kept = steps[0].total, steps[-1].forwarded
    workers.say("clean", f"{name}: {total:,} in, {total - kept:,} dropped, {kept:,} out")
    return found


def build_vocabulary(
    cfg: DataConfig, inputs: dict[str, Input], cleans: dict[str, Clean], workers: Tasks
) -> Path:
    """The vocabulary's file: reused, trained, or copied from the one that the config names."""
    settings, file = cfg.tokenizer, tokenizer_path(cfg)
    if settings.path is not None:
        tokenizer.load(Path(settings.path), settings.sha256)
    key = fingerprints.tokenizer_key(cfg, [given.key for given in inputs.values()])
    built = fingerprints.read_built(file.parent, key)
    if built is not None and file.is_file() and sha256_of(file) == built["sha256"]:
        workers.say("tokenizer", f"reused, {built['sha256'][:12]}")
        return file
    place = fingerprints.construction(Path(cfg.folder), "tokenizer", key)
    if settings.path is not None:
        tokenizer.adopt(Path(settings.path), settings.sha256, settings.vocab_size, place)
    elif not cleans:
        raise InputError("no source has text to train a vocabulary on: set data.tokenizer.path")
    else:
        size = settings.train_megabytes * 10**6
        train = (shard.tokenizer_task, list(cleans.values()), cfg.heldout_percent, size)
        list(workers.run("tokenizer", {"train": [(*train, settings.vocab_size, place)]}))
    sha256 = sha256_of(place / tokenizer.FILE)
    fingerprints.write_built(place, key, sha256=sha256)
    fingerprints.install(place, file.parent)
    how = "trained" if settings.path is None else "copied"
    ids = tokenizer.load(file).get_vocab_size()
    workers.say("tokenizer", f"{how}, {ids:,} ids, {sha256[:12]}")
    return file


def build_shards(
    cfg: DataConfig,
    inputs: dict[str, Input],
    cleans: dict[str, Clean],
    vocabulary: Path,
    workers: Tasks,
) -> dict[str, Manifest]:
    """Manifests of every source's shards, tokenized where they are not there yet."""
    folder = Path(cfg.folder)
    wanted = wanted_manifests(cfg, inputs, vocabulary)
    manifests: dict[str, Manifest] = {}
    verifying = {
        name: [(fingerprints.same_shards, source_folder(cfg, name), wanted[name])]
        for name in wanted
    }
    for name, (same,) in workers.run("verify", verifying):
        if same:
            manifests[name] = read_manifest(source_folder(cfg, name))
            tokens = sum(manifests[name].tokens(split) for split in SPLITS)
            workers.say("shards", f"{name}: reused, {tokens:,} tokens")
    places: dict[str, Path] = {}
    jobs: dict[str, list[Job]] = {}
    for name in (name for name in cfg.sources if name not in manifests):
        key = fingerprints.shards_key(wanted[name])
        places[name] = fingerprints.construction(folder, f"shards/{name}", key)
        if name not in cleans:
            fingerprints.pin_tasks(folder, name, cfg.sources[name].tasks)
        jobs[name] = shard_jobs(cfg, name, inputs[name].listing, cleans.get(name), places[name])
    for name, results in workers.run("shards", jobs):
        files = [ShardFile(**file) for task in results for file in task]
        splits = split_files(cfg, name, files, cleans.get(name))
        manifest = manifests[name] = replace(wanted[name], splits=splits)
        write_manifest(places[name], manifest)
        fingerprints.install(places[name], source_folder(cfg, name))
        train, heldout = (manifest.tokens(split) for split in SPLITS)
        workers.say("shards", f"{name}: {train:,} train and {heldout:,} held out")
    return manifests


def wanted_manifests(
    cfg: DataConfig, inputs: dict[str, Input], vocabulary: Path
) -> dict[str, Manifest]:
    """The manifests that the shards must have, without their files."""
    sha256, size = sha256_of(vocabulary), tokenizer.size_of(tokenizer.load(vocabulary))
    return {
        name: Manifest(
            source=name,
            licence=source.licence,
            recipe=source.recipe,
            recipe_sha256=fingerprints.recipe_sha256(cfg, name, inputs[name].listing),
            tokenizer_sha256=sha256,
            eos=tokenizer.EOS,
            vocab_size=size,
            splits={split: [] for split in SPLITS},
            versions=fingerprints.shard_versions(source),
        )
        for name, source in cfg.sources.items()
    }


def split_files(
    cfg: DataConfig, name: str, files: list[ShardFile], clean: Clean | None
) -> dict[str, list[ShardFile]]:
    """The shards by split; asserts that no document is missing. InputError for an empty split."""
    documents = sum(file.documents for file in files)
    if clean is not None:
        expected = clean.documents
        assert documents == expected, f"{name}: {documents} of {expected} documents in shards"
    splits = {split: [file for file in files if file.name.startswith(split)] for split in SPLITS}
    for split in SPLITS:
        if not splits[split]:
            raise InputError(
                f"source {name}: no document of {documents} fell into the split {split}; "
                "give it more documents or set data.heldout_percent, now "
                f"{cfg.heldout_percent}"
            )
    return splits


def report(cfg: DataConfig, cleans: dict[str, Clean], manifests: dict[str, Manifest]) -> None:
    """Print what became of every source's documents, step by step, and write it to report.json."""
    steps = {
        name: cleans[name].steps if name in cleans else [megatron.step(manifests[name])]
        for name in cfg.sources
    }
    print("\n" + "\n".join(accounting.table(steps)))
    print(f"\n{'source':<14}{'documents':>12}{'train tokens':>18}{'held out':>14}{'bytes':>18}")
    for name in cfg.sources:
        train, heldout = (manifests[name].tokens(split) for split in SPLITS)
        size, documents = 2 * (train + heldout), steps[name][-1].forwarded
        print(f"{name:<14}{documents:>12,}{train:>18,}{heldout:>14,}{size:>18,}")
    record: dict[str, Any] = {
        name: [asdict(step) for step in found] for name, found in steps.items()
    }
    write_json(Path(cfg.folder) / REPORT, {"steps": record})


@command(PrepareConfig)
def main(cfg: PrepareConfig) -> None:
    """Prepare the data of a composed config, or take over what is there and do no more."""
    if cfg.prepare.adopt:
        adopt(cfg.data, cfg.executor)
    else:
        prepare(cfg.data, cfg.executor, rebuild=cfg.prepare.rebuild)


if __name__ == "__main__":
    main()
