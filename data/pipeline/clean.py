"""Passes that turn a source's raw input into clean documents, each a list of tasks.

    clean                                           the recipe's steps
    signatures, buckets, clusters, unique           near duplicates, if the source sets it
    windows, repeats, cut                           exact substrings, if the source sets it

A pass starts when all tasks of the previous pass have ended. The last pass writes the clean
documents.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.formatters import PIIFormatter

from core.errors import InputError
from core.files import move_into, sync_filesystem
from data import recipes
from data.config import Assets, Source
from data.pipeline import minhash, substrings
from data.pipeline.accounting import StepCounts, read_counts
from data.pipeline.tasks import document_writer, run_task, set_exclusion_writers
from data.readers.base import QUARANTINE
from data.readers.listing import Listing, pin_files
from data.recipes.decontamination import DecontaminationFilter

Job = tuple[Any, ...]
# lower bound of compressed bytes per word or mark; it only decides the number of partitions
BYTES_PER_TOKEN = 2
# raise with the order of the passes, the rows that they write, or the readers
# 2: line ends, invisible characters (readers/normalize.py); JSON beyond the standard
VERSION = 2
OPTIONAL_ASSETS = ("math_classifier", "url_blocklist")  # read where a path is set
KEEP_FOLDERS = ("logs", "excluded", QUARANTINE)


@dataclass(frozen=True)
class Build:
    """A source whose clean documents are being built."""

    source: Source
    assets: Assets
    folder: Path
    keep_exclusions: bool

    def excluded(self, name: str) -> Path | None:
        """Folder of the documents that pass `name` drops; None if they are not kept."""
        return self.folder / "excluded" / name if self.keep_exclusions else None


@dataclass(frozen=True)
class Pass:
    """A list of jobs, known when the previous pass has ended."""

    name: str
    jobs: Callable[[], list[Job]]
    logs: Path
    out: Path | None = None  # for a pass that writes documents


def cleaning_steps(build: Build) -> list[PipelineStep]:
    """Return the steps from raw files to clean documents, without the writer of the documents.

    Raises InputError if the recipe cannot take the source's settings or files.
    """
    source = build.source
    steps: list[PipelineStep]
    steps = recipes.load(source.recipe).steps(source, build.folder, build.assets)
    if source.replace_pii:
        steps.append(PIIFormatter())
    if source.decontaminate:
        steps.append(DecontaminationFilter(str(build.assets.evaluations.path)))
    return steps


def clean_task(build: Build, rank: int) -> None:
    """Clean one task's files of a source into `documents/clean`/<rank>.jsonl.gz."""
    steps = cleaning_steps(build)
    if (excluded := build.excluded("clean")) is not None:
        set_exclusion_writers(excluded, steps)
    steps.append(document_writer(build.folder / "documents" / "clean"))
    run_task(steps, build.folder / "logs" / "clean", rank, build.source.tasks)


def check_packages(source: Source) -> None:
    """Import every package that a source's passes need; raises InputError for a missing one."""
    recipes.load(source.recipe)
    if source.near_duplicates is not None:
        recipes.require(minhash.REQUIRES, "near_duplicates")
    if source.exact_substrings:
        recipes.require(substrings.REQUIRES, "exact_substrings")


def start(build: Build, listing: Listing) -> None:
    """Pin the list of input files, and load in this process what forked workers share.

    Raises InputError if the recipe cannot take the source, before any worker starts.
    """
    pin_files(build.folder, listing)
    preload = getattr(recipes.load(build.source.recipe), "preload", None)
    if preload is not None:
        preload(build.source, build.assets)
    cleaning_steps(build)


def passes(build: Build) -> list[Pass]:
    """All passes of a source in order."""
    source = build.source
    documents = build.folder / "documents" / "clean"
    jobs = [(clean_task, build, rank) for rank in range(source.tasks)]
    chain = [Pass("clean", lambda: list(jobs), build.folder / "logs" / "clean", documents)]
    if source.near_duplicates is not None:
        chain += near_duplicate_passes(build, source.near_duplicates, documents)
        documents = build.folder / "documents" / "unique"
    if source.exact_substrings:
        chain += substring_passes(build, source.exact_substrings, documents)
    return chain


def near_duplicate_passes(build: Build, setting: str, documents: Path) -> list[Pass]:
    """MinHash passes over the documents of the previous pass."""
    work = build.folder / "minhash"
    out = build.folder / "documents" / "unique"
    excluded, logs = build.excluded("unique"), work / "logs"
    tasks = build.source.tasks
    signatures = [
        (minhash.signatures, setting, documents, work, rank, tasks) for rank in range(tasks)
    ]
    num_buckets = minhash.parse_config(setting).num_buckets
    buckets = [(minhash.buckets, setting, work, bucket) for bucket in range(num_buckets)]
    unique = [
        (minhash.unique, documents, work, out, excluded, rank, tasks) for rank in range(tasks)
    ]
    return [
        Pass("signatures", lambda: list(signatures), logs / "signatures"),
        Pass("buckets", lambda: list(buckets), logs / "buckets"),
        Pass("clusters", lambda: [(minhash.clusters, work)], logs / "clusters"),
        Pass("unique", lambda: list(unique), logs / "unique", out),
    ]


def substring_passes(build: Build, n: int, documents: Path) -> list[Pass]:
    """Exact-substring passes over the documents of the previous pass."""
    work = build.folder / "substrings"
    out = build.folder / "documents" / "cut"
    excluded, logs = build.excluded("cut"), work / "logs"
    tasks = build.source.tasks

    def num_partitions() -> int:
        """The same at every launch, since the files of the previous pass are complete."""
        size = sum(path.stat().st_size for path in documents.glob("*.jsonl.gz"))
        return substrings.partitions_for(size // BYTES_PER_TOKEN)

    def windows() -> list[Job]:
        partitions = num_partitions()
        return [
            (substrings.index_windows, n, documents, work, partitions, rank, tasks)
            for rank in range(tasks)
        ]

    def repeats() -> list[Job]:
        partitions = range(num_partitions())
        return [(substrings.repeats_task, work, partition, tasks) for partition in partitions]

    def cut() -> list[Job]:
        partitions = num_partitions()
        return [
            (substrings.cut_repeats, n, documents, work, partitions, out, excluded, rank, tasks)
            for rank in range(tasks)
        ]

    return [
        Pass("windows", windows, logs / "windows"),
        Pass("repeats", repeats, logs / "repeats"),
        Pass("cut", cut, logs / "cut", out),
    ]


def count_documents(build: Build) -> list[StepCounts]:
    """Counts per step of all passes; asserts that no document was lost in or between passes."""
    steps: list[StepCounts] = []
    for each in passes(build):
        logs = build.folder / "logs" / each.name
        if not logs.is_dir():
            logs = each.logs
        if each.out is not None:
            steps += read_counts(logs / "stats", build.source.tasks, steps[-1:])
        elif each.name in ("signatures", "windows"):
            # these passes read every document too
            read_counts(logs / "stats", build.source.tasks, steps[-1:])
    return steps


def finish(build: Build) -> None:
    """Move the last pass's documents into the build's folder, remove the other passes' files.

    May be called again after an interruption.
    """
    logs = build.folder / "logs"
    others = [each.logs for each in passes(build) if each.logs != logs / each.name]
    sync_filesystem(build.folder)  # tasks close their logs after the sync that completes them
    move_into(logs, [folder for folder in others if folder.is_dir()])
    documents = [each.out for each in passes(build) if each.out is not None][-1]
    move_into(build.folder, sorted(documents.glob("*.jsonl.gz")))
    for path in build.folder.iterdir():
        if path.is_dir() and path.name not in KEEP_FOLDERS:
            shutil.rmtree(path)


def check_assets(name: str, source: Source, assets: Assets) -> list[str]:
    """Names of the assets that a source reads; raises InputError for a missing one."""
    if source.recipe == recipes.MEGATRON:
        return []
    required = list(getattr(recipes.load(source.recipe), "ASSETS", ()))
    required += ["evaluations"] if source.decontaminate else []
    optional = [asset for asset in OPTIONAL_ASSETS if getattr(assets, asset).path is not None]
    for asset in required + optional:
        path = getattr(assets, asset).path
        if path is None or not Path(path).is_file():
            raise InputError(
                f"source {name} needs data.assets.{asset}.path, now {path}: set it, and fetch the "
                "file with `python data/download.py` on a machine with internet access"
            )
    return required
