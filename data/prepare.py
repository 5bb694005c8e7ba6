"""Prepare a data set: raw text -> clean documents -> tokenizer -> token shards.

Complete stages are reused, and a killed run resumes task by task.

examples:
  python data/prepare.py +experiment=demo
  python data/prepare.py +experiment=7b executor=slurm executor.partition=cpu
  python data/prepare.py +experiment=7b prepare.adopt=true    # keep data from an earlier version
"""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from core.command import command
from core.errors import InputError
from core.files import check_folder, sha256_of, write_json
from core.records import read_if_present
from data import own, recipes, tokenizer, vocabulary
from data.config import DataConfig, ExecutorConfig, PrepareConfig
from data.pipeline import accounting, clean, fingerprints, megatron, shard
from data.pipeline.adoption import adopt
from data.pipeline.clean import Build
from data.pipeline.executors import Job, TaskExecutor, open_executor
from data.pipeline.settings import check_settings
from data.pipeline.shard import CleanDocuments
from data.pipeline.shard_jobs import group_by_split, shard_jobs
from data.pipeline.workers import lock_folder
from data.readers.listing import Listing, describe_ignored
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
FIX = "restore it, or set prepare.rebuild=true to prepare the source again"


@dataclass(frozen=True)
class SourceInput:
    """Input files of a source, listed once at the start of a run."""

    listing: Listing
    key: str  # fingerprint of the clean documents made from this input


def prepare(
    cfg: DataConfig, executor_config: ExecutorConfig | None = None, *, rebuild: bool = False
) -> None:
    """Build everything under `cfg.folder`, by default with processes on this machine.

    Replaces data of other versions only with `rebuild`. Raises InputError for a user's mistake.
    """
    folder = Path(cfg.folder)
    with (
        lock_folder(folder),
        closing(open_executor(executor_config, cfg.workers, folder)) as executor,
    ):
        check_folder(folder, "data.folder")
        if cfg.input is not None:
            own.remember(folder, cfg.input)
        executor.log("prepare", f"{', '.join(cfg.sources)} into {folder}, {executor.describe()}")
        inputs = list_inputs(cfg)
        for name, each in inputs.items():
            if each.listing.ignored:
                executor.log("input", f"{name}: not read: {describe_ignored(each.listing.ignored)}")
        if not rebuild:
            check_versions(cfg, inputs)
        cleaned = clean_sources(cfg, inputs, executor)
        tokenizer_file = build_tokenizer(cfg, inputs, cleaned, executor)
        manifests = build_shards(cfg, inputs, cleaned, tokenizer_file, executor)
        report(cfg, inputs, cleaned, manifests)
        executor.log("done", str(folder / "shards"))
        if cfg.input is not None:
            own.remember_tokens(folder, manifests[own.SOURCE].tokens("train"))
            executor.log("next", own.next_command(folder))


def list_inputs(cfg: DataConfig) -> dict[str, SourceInput]:
    """List every source's input files; raises InputError before any work starts."""
    check_settings(cfg)
    listings = {name: fingerprints.list_input(source) for name, source in cfg.sources.items()}
    return {
        name: SourceInput(listing, fingerprints.clean_key(cfg, name, listing))
        for name, listing in listings.items()
    }


def check_versions(cfg: DataConfig, inputs: dict[str, SourceInput]) -> None:
    """Raise InputError if finished data was prepared by other versions of recipes or packages.

    A changed config rebuilds without asking; neither an upgrade nor a damaged record may discard
    weeks of work.
    """
    outdated = []
    for name, source in cfg.sources.items():
        path = Path(cfg.folder) / "clean" / name / fingerprints.BUILT
        built = read_if_present(path, fingerprints.BuiltClean, FIX)
        changes = []
        if built is not None and built["key"] != inputs[name].key:
            versions = fingerprints.versions_of(source)
            changes.append(fingerprints.describe_changes(built.get("versions", {}), versions))
        path = source_folder(cfg, name) / MANIFEST
        recorded = read_if_present(path, fingerprints.Versions, FIX, extra="ignore")
        if recorded is not None:
            versions = fingerprints.shard_versions(source)
            changes.append(fingerprints.describe_changes(recorded.get("versions", {}), versions))
        if distinct := dict.fromkeys(filter(None, changes)):
            outdated.append(f"{name} by {', '.join(distinct)}")
    if outdated:
        raise InputError(
            f"data was prepared with other versions: {'; '.join(outdated)}. Set "
            "prepare.adopt=true to keep it or prepare.rebuild=true to replace it"
        )


def clean_sources(
    cfg: DataConfig, inputs: dict[str, SourceInput], executor: TaskExecutor
) -> dict[str, CleanDocuments]:
    """Clean every source of raw text, or reuse its clean documents; in the config's order."""
    folder = Path(cfg.folder)
    cleaned: dict[str, CleanDocuments] = {}
    builds: dict[str, Build] = {}
    for name, source in cfg.sources.items():
        if source.recipe == recipes.MEGATRON:
            continue
        if existing := read_clean(cfg, name, inputs[name]):
            cleaned[name] = existing
            executor.log("clean", f"{name}: reused, {existing.documents:,} documents")
            continue
        # import before the workers fork; a missing package fails before the first document
        clean.check_packages(source)
        build_dir = fingerprints.open_build_dir(folder, f"clean/{name}", inputs[name].key)
        builds[name] = Build(source, cfg.assets, build_dir, cfg.keep_exclusions)
    for name, build in builds.items():
        fingerprints.pin_num_tasks(folder, name, build.source.tasks)
        clean.start(build, inputs[name].listing)
    for name in run_passes(builds, executor):
        cleaned[name] = finish_clean(cfg, name, inputs[name], builds[name], executor)
    return {name: cleaned[name] for name in cfg.sources if name in cleaned}


def read_clean(cfg: DataConfig, name: str, source_input: SourceInput) -> CleanDocuments | None:
    """Finished clean documents of a source; None if the key or a file's size differs."""
    folder = Path(cfg.folder) / "clean" / name
    built = fingerprints.read_built(folder, fingerprints.BuiltClean, source_input.key)
    if built is None or built["files"] != fingerprints.file_sizes(folder):
        return None
    return CleanDocuments(folder, sorted(built["files"]), built["steps"])


def run_passes(builds: dict[str, Build], executor: TaskExecutor) -> Iterator[str]:
    """Run pass n of all sources together; yields a source's name after its last pass."""
    passes = {name: clean.passes(build) for name, build in builds.items()}
    for n in range(max(map(len, passes.values()), default=0)):
        current = {name: chain[n] for name, chain in passes.items() if n < len(chain)}
        stage = "/".join(dict.fromkeys(each.name for each in current.values()))
        jobs = {name: each.jobs() for name, each in current.items()}
        for name, _ in executor.run(stage, jobs):
            if n == len(passes[name]) - 1:
                yield name


def finish_clean(
    cfg: DataConfig, name: str, source_input: SourceInput, build: Build, executor: TaskExecutor
) -> CleanDocuments:
    """Check the counts, move the clean documents into place and remove the source's old shards."""
    folder = Path(cfg.folder)
    steps = clean.count_documents(build)
    accounting.check_files(name, steps, source_input.listing)
    try:
        accounting.check_yield(name, steps, build.source.min_yield)
        if not steps[-1].forwarded:
            raise InputError(
                f"source {name}: all {steps[0].total} documents were dropped "
                f"({accounting.drop_reasons(steps) or 'its files have no rows'}): set recipe and "
                f"text_key of data.sources.{name} to those of its files"
            )
    except (RuntimeError, InputError) as error:
        # the next run would skip these tasks, since they are marked complete
        fingerprints.remove_folder(build.folder)
        raise InputError(str(error)) from error
    clean.finish(build)
    fingerprints.write_built(
        build.folder,
        source_input.key,
        files=fingerprints.file_sizes(build.folder),
        steps=[asdict(step) for step in steps],
        **fingerprints.provenance(build.source, source_input.listing),
    )
    fingerprints.remove_folder(folder / "shards" / name)
    fingerprints.remove_folder(folder / "building" / "shards" / name)
    fingerprints.move_into_place(build.folder, folder / "clean" / name)
    cleaned = read_clean(cfg, name, source_input)
    assert cleaned is not None
    total, kept = steps[0].total, steps[-1].forwarded
    dropped = sum(sum(step.dropped.values()) for step in steps)
    executor.log("clean", f"{name}: {total:,} in, {dropped:,} dropped, {kept:,} out")
    return cleaned


def build_tokenizer(
    cfg: DataConfig,
    inputs: dict[str, SourceInput],
    cleaned: dict[str, CleanDocuments],
    executor: TaskExecutor,
) -> Path:
    """Path of the tokenizer: reused, copied from `tokenizer.path`, or trained on `cleaned`."""
    settings, file = cfg.tokenizer, tokenizer_path(cfg)
    key = fingerprints.tokenizer_key(cfg, [source_input.key for source_input in inputs.values()])
    built = fingerprints.read_built(file.parent, fingerprints.BuiltTokenizer, key)
    if built is not None and tokenizer_is_whole(file, built):
        executor.log("tokenizer", f"reused, {tokenizer.describe(file)}")
        return file
    build_dir = fingerprints.open_build_dir(Path(cfg.folder), "tokenizer", key)
    if settings.path is not None:
        tokenizer.copy_tokenizer(settings, build_dir)
    elif not cleaned:
        raise InputError("no source has text to train a tokenizer on: set data.tokenizer.path")
    else:
        max_bytes = settings.train_megabytes * 10**6
        train = (shard.tokenizer_task, list(cleaned.values()), cfg.heldout_percent, max_bytes)
        list(executor.run("tokenizer", {"train": [(*train, settings.vocab_size, build_dir)]}))
    files = {path.name: sha256_of(path) for path in sorted(build_dir.glob("*.json"))}
    fingerprints.write_built(build_dir, key, sha256=files[tokenizer.FILE], files=files)
    fingerprints.move_into_place(build_dir, file.parent)
    action = "trained" if settings.path is None else "copied"
    executor.log("tokenizer", f"{action}, {tokenizer.describe(file)}")
    return file


def tokenizer_is_whole(file: Path, built: fingerprints.BuiltTokenizer) -> bool:
    """Whether tokenizer.json and the files beside it are those that were built.

    Records of before 0.3 have the hash of tokenizer.json only.
    """
    files = built.get("files", {file.name: built["sha256"]})
    paths = {file.with_name(name): sha256 for name, sha256 in files.items()}
    return all(path.is_file() and sha256_of(path) == sha256 for path, sha256 in paths.items())


def build_shards(
    cfg: DataConfig,
    inputs: dict[str, SourceInput],
    cleaned: dict[str, CleanDocuments],
    tokenizer_file: Path,
    executor: TaskExecutor,
) -> dict[str, Manifest]:
    """Tokenize every source into shards, or reuse its shards; returns the manifests."""
    folder = Path(cfg.folder)
    expected = expected_manifests(cfg, inputs, tokenizer_file)
    manifests: dict[str, Manifest] = {}
    checks = {
        name: [(fingerprints.shards_match, source_folder(cfg, name), expected[name])]
        for name in expected
    }
    for name, (matches,) in executor.run("verify", checks):
        if matches:
            manifests[name] = read_manifest(source_folder(cfg, name))
            tokens = sum(manifests[name].tokens(split) for split in SPLITS)
            executor.log("shards", f"{name}: reused, {tokens:,} tokens")
    build_dirs: dict[str, Path] = {}
    jobs: dict[str, list[Job]] = {}
    for name in [name for name in cfg.sources if name not in manifests]:
        key = fingerprints.shards_key(expected[name])
        build_dirs[name] = fingerprints.open_build_dir(folder, f"shards/{name}", key)
        if name not in cleaned:
            fingerprints.pin_num_tasks(folder, name, cfg.sources[name].tasks)
        listing = inputs[name].listing
        jobs[name] = shard_jobs(cfg, name, listing, cleaned.get(name), build_dirs[name])
    for name, results in executor.run("shards", jobs):
        files = [ShardFile(**file) for task in results for file in task]
        splits = group_by_split(cfg, name, files, cleaned.get(name))
        manifest = manifests[name] = replace(expected[name], splits=splits)
        write_manifest(build_dirs[name], manifest)
        fingerprints.move_into_place(build_dirs[name], source_folder(cfg, name))
        train, heldout = (manifest.tokens(split) for split in SPLITS)
        executor.log("shards", f"{name}: {train:,} train and {heldout:,} held-out tokens")
    return manifests


def expected_manifests(
    cfg: DataConfig, inputs: dict[str, SourceInput], tokenizer_file: Path
) -> dict[str, Manifest]:
    """Manifests that match this config, with empty lists of files."""
    sha256 = sha256_of(tokenizer_file)
    loaded = tokenizer.load(tokenizer_file)
    eos, vocab_size = (
        vocabulary.end_id(tokenizer_file, loaded),
        vocabulary.required_vocab_size(loaded),
    )
    return {
        name: Manifest(
            source=name,
            licence=source.licence,
            recipe=source.recipe,
            recipe_sha256=fingerprints.recipe_sha256(cfg, name, inputs[name].listing),
            tokenizer_sha256=sha256,
            eos=eos,
            vocab_size=vocab_size,
            splits={split: [] for split in SPLITS},
            versions=fingerprints.shard_versions(source),
        )
        for name, source in cfg.sources.items()
    }


def report(
    cfg: DataConfig,
    inputs: dict[str, SourceInput],
    cleaned: dict[str, CleanDocuments],
    manifests: dict[str, Manifest],
) -> None:
    """Print the document counts of every step; write them and counts of files to report.json."""
    steps = {
        name: cleaned[name].steps if name in cleaned else [megatron.step_counts(manifests[name])]
        for name in cfg.sources
    }
    print("\n" + "\n".join(accounting.table(steps)))
    print("\n" + "\n".join(accounting.token_table(steps, manifests)))
    files = {name: each.listing.counts() for name, each in inputs.items()}
    counts = {name: [asdict(step) for step in each] for name, each in steps.items()}
    write_json(Path(cfg.folder) / REPORT, {"steps": counts, "files": files})


@command(PrepareConfig)
def main(cfg: PrepareConfig) -> None:
    """Prepare the data of a composed config; with prepare.adopt, only adopt existing data."""
    if cfg.prepare.adopt:
        adopt(cfg.data, cfg.executor)
    else:
        prepare(cfg.data, cfg.executor, rebuild=cfg.prepare.rebuild)


if __name__ == "__main__":
    main()
