"""Near duplicates inside a source by MinHash, datatrove's four steps as passes of ours.

datatrove asks for the same tasks and the same reader in its first and last step, and removes wrong documents without
a word when they differ; here both read the files that the pass before wrote, task by task.

Costs: a signature is 8 bytes per hash and 4 per bucket and document on disk (952 bytes for 14x8, 11,532 for 93x15);
clustering is one process that holds about 300 bytes per document that has a duplicate.
"""

from pathlib import Path

from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig

from data.tasks import Documents, exclude_into, run_task, write_documents

REQUIRES = ("spacy", "xxhash")
N_GRAMS = 5  # words; RefinedWeb and FineWeb


def config_of(setting: str) -> MinhashConfig:
    """From "<buckets>x<hashes per bucket>"."""
    buckets, hashes = map(int, setting.split("x"))
    return MinhashConfig(n_grams=N_GRAMS, num_buckets=buckets, hashes_per_bucket=hashes)


class OnePerCluster(MinhashDedupFilter):
    """Keeps one document of every cluster of near duplicates."""

    name = "Near duplicates"


def signatures(setting: str, documents: Path, work: Path, rank: int, tasks: int) -> None:
    """Pass 1, one task per file of documents."""
    step = MinhashDedupSignature(str(work / "signatures"), config_of(setting))
    run_task([Documents(documents), step], work / "logs" / "signatures", rank, tasks)


def buckets(setting: str, work: Path, rank: int) -> None:
    """Pass 2, one task per bucket: pairs of documents with the same signature."""
    config = config_of(setting)
    step = MinhashDedupBuckets(str(work / "signatures"), str(work / "pairs"), config=config)
    run_task([step], work / "logs" / "buckets", rank, config.num_buckets)


def clusters(setting: str, work: Path) -> None:
    """Pass 3, one task: transitive closure, and per file of documents the numbers of those that go."""
    step = MinhashDedupCluster(str(work / "pairs"), str(work / "remove"), config=config_of(setting))
    run_task([step], work / "logs" / "clusters", 0, 1)


def unique(documents: Path, work: Path, out: Path, excluded: Path | None, rank: int, tasks: int) -> None:
    """Pass 4, one task per file of documents: write what stays to `out`."""
    (work / "remove").mkdir(exist_ok=True)  # absent where nothing repeats
    steps = [Documents(documents), OnePerCluster(str(work / "remove"))]
    if excluded is not None:
        exclude_into(excluded, steps)
    run_task([*steps, write_documents(out)], work / "logs" / "unique", rank, tasks)
