"""The passes that turn a source's raw input into clean documents, each a list of tasks that run one
by one.

    clean                                           the recipe's steps
    signatures, buckets, clusters, unique           near duplicates, if the source asks for it
    windows, repeats, cut                           exact substrings, if the source asks for it

A pass begins when the one before has ended for all tasks; the last one's files are the clean
documents.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.pipeline.formatters import PIIFormatter

from core.errors import InputError
from data import recipes
from data.config import Assets, Source
from data.pipeline import minhash, substrings
from data.pipeline.accounting import Step, read_counts
from data.pipeline.tasks import exclude_into, run_task, write_documents
from data.recipes.decontamination import DecontaminationFilter
from data.recipes.readers import QUARANTINE, pin_files

Job = tuple[Any, ...]
# compressed text per word or mark, from below: it only decides into how many parts the work is cut
BYTES_PER_TOKEN = 2
VERSION = 1  # raised with the order of the passes, or the row that they write
KEPT = ("logs", "excluded", QUARANTINE)


@dataclass(frozen=True)
class Build:
    """A source under construction."""

    source: Source
    assets: Assets
    place: Path
    keep_exclusions: bool

    def excluded(self, name: str) -> Path | None:
        """Where a pass writes what it drops, if it does."""
        return self.place / "excluded" / name if self.keep_exclusions else None


@dataclass(frozen=True)
class Pass:
    """A list of tasks that is known when the pass before has ended."""

    name: str
    jobs: Callable[[], list[Job]]
    logs: Path
    out: Path | None = None  # of a pass that writes documents


def clean_task(build: Build, rank: int) -> None:
    """Clean one task's share of a source into `documents/clean`/<rank>.jsonl.gz."""
    source = build.source
    steps = recipes.load(source.recipe).steps(source, build.place, build.assets)
    if source.replace_pii:
        steps.append(PIIFormatter())
    if source.decontaminate:
        steps.append(DecontaminationFilter(str(build.assets.evaluations.path)))
    if (excluded := build.excluded("clean")) is not None:
        exclude_into(excluded, steps)
    documents = build.place / "documents" / "clean"
    run_task(
        [*steps, write_documents(documents)], build.place / "logs" / "clean", rank, source.tasks
    )


def check_packages(source: Source) -> None:
    """Import everything that the passes of a source need; raises InputError for what is missing."""
    recipes.load(source.recipe)
    if source.near_duplicates is not None:
        recipes.require(minhash.REQUIRES, "near_duplicates")
    if source.exact_substrings:
        recipes.require(substrings.REQUIRES, "exact_substrings")


def begin(build: Build, kind: str, files: Iterable[str]) -> None:
    """Fix the files that are read, and load in this process what all workers share."""
    pin_files(build.place, kind, list(files))
    preload = getattr(recipes.load(build.source.recipe), "preload", None)
    if preload is not None:
        preload(build.source, build.assets)


def passes(build: Build) -> list[Pass]:
    """All passes of a source in order."""
    source, place = build.source, build.place
    tasks = range(source.tasks)
    documents = place / "documents" / "clean"
    clean = [(clean_task, build, rank) for rank in tasks]
    found = [Pass("clean", lambda: list(clean), place / "logs" / "clean", documents)]
    if source.near_duplicates is not None:
        found += near_duplicate_passes(build, source.near_duplicates, documents)
        documents = place / "documents" / "unique"
    if source.exact_substrings:
        found += substring_passes(build, source.exact_substrings, documents)
    return found


def near_duplicate_passes(build: Build, setting: str, documents: Path) -> list[Pass]:
    """MinHash over the documents of the pass before."""
    work, out, tasks = (
        build.place / "minhash",
        build.place / "documents" / "unique",
        build.source.tasks,
    )
    excluded, logs = build.excluded("unique"), work / "logs"
    first = [(minhash.signatures, setting, documents, work, rank, tasks) for rank in range(tasks)]
    number = minhash.config_of(setting).num_buckets
    second = [(minhash.buckets, setting, work, bucket) for bucket in range(number)]
    last = [(minhash.unique, documents, work, out, excluded, rank, tasks) for rank in range(tasks)]
    return [
        Pass("signatures", lambda: list(first), logs / "signatures"),
        Pass("buckets", lambda: list(second), logs / "buckets"),
        Pass("clusters", lambda: [(minhash.clusters, work)], logs / "clusters"),
        Pass("unique", lambda: list(last), logs / "unique", out),
    ]


def substring_passes(build: Build, n: int, documents: Path) -> list[Pass]:
    """Exact substrings over the documents of the pass before."""
    work, out, tasks = (
        build.place / "substrings",
        build.place / "documents" / "cut",
        build.source.tasks,
    )
    excluded, logs = build.excluded("cut"), work / "logs"

    def parts() -> int:
        """The same number at every launch: the files of the pass before are complete."""
        size = sum(path.stat().st_size for path in documents.glob("*.jsonl.gz"))
        return substrings.partitions_for(size // BYTES_PER_TOKEN)

    def index() -> list[Job]:
        return [
            (substrings.index_windows, n, documents, work, parts(), rank, tasks)
            for rank in range(tasks)
        ]

    def repeats() -> list[Job]:
        return [(substrings.repeats_task, work, partition, tasks) for partition in range(parts())]

    def cut() -> list[Job]:
        return [
            (substrings.cut_repeats, n, documents, work, parts(), out, excluded, rank, tasks)
            for rank in range(tasks)
        ]

    return [
        Pass("windows", index, logs / "windows"),
        Pass("repeats", repeats, logs / "repeats"),
        Pass("cut", cut, logs / "cut", out),
    ]


def count(build: Build) -> list[Step]:
    """Counts per step of every pass; asserts that no document was lost in or between passes."""
    steps: list[Step] = []
    for one in passes(build):
        logs = build.place / "logs" / one.name
        if not logs.is_dir():
            logs = one.logs
        if one.out is not None:
            steps += read_counts(logs / "stats", build.source.tasks, steps[-1:])
        elif one.name in ("signatures", "windows"):
            # they see every document too
            read_counts(logs / "stats", build.source.tasks, steps[-1:])
    return steps


def finish(build: Build) -> None:
    """Move the last pass's documents into the folder, remove other passes'; may be called again."""
    writing = [one for one in passes(build) if one.out is not None]
    for one in passes(build):
        if one.logs.is_dir() and one.logs != build.place / "logs" / one.name:
            one.logs.rename(build.place / "logs" / one.name)
    last = writing[-1].out
    assert last is not None
    for path in sorted(last.glob("*.jsonl.gz")):
        path.rename(build.place / path.name)
    for path in build.place.iterdir():
        if path.is_dir() and path.name not in KEPT:
            shutil.rmtree(path)


def check_assets(name: str, source: Source, assets: Assets) -> list[str]:
    """Names of the assets that a source reads; raises InputError for one that is missing."""
    if source.recipe == recipes.MEGATRON:
        return []
    needed = list(getattr(recipes.load(source.recipe), "ASSETS", ()))
    needed += ["evaluations"] if source.decontaminate else []
    for asset in needed:
        path = getattr(assets, asset).path
        if path is None or not Path(path).is_file():
            raise InputError(
                f"source {name} needs data.assets.{asset}.path, now {path}: set it, and fetch "
                "what it names with `python data/download.py` on a machine with a network"
            )
    return needed
