"""Near duplicates inside a source by MinHash: datatrove's signatures, pairs and filter, and
clusters of ours.

datatrove asks for the same tasks and the same reader in its first and last step, and removes wrong
documents without a word when they differ; here both read the files that the pass before wrote, task
by task. Its clustering holds a dictionary of some 300 bytes per document that has a duplicate, and
which of a cluster stays depends on its history; ours holds 16 bytes and the pairs of one bucket,
and the first document stays.

Costs: a signature is 8 bytes per hash and 4 per bucket and document on disk (952 bytes for 14x8,
11,532 for 93x15).
"""

from pathlib import Path

import numpy as np
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from numpy.typing import NDArray

from data.pipeline.tasks import Documents, exclude_into, run_task, write_documents

REQUIRES = ("spacy", "xxhash")
VERSION = 1  # raised with what it keeps or removes
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


def pairs_of(path: Path) -> NDArray[np.uint64]:
    """The pairs of one bucket, [pairs, 2]; a document is (its file's number << 32) + its index."""
    halves = np.fromfile(path, dtype="<u4").reshape(-1, 2).astype(np.uint64)
    return (halves[:, 0] << np.uint64(32) | halves[:, 1]).reshape(-1, 2)


def first_of_cluster(nodes: NDArray[np.uint64], files: list[Path]) -> NDArray[np.int64]:
    """For each of the sorted nodes the least one that pairs of any file connect it to, both as
    indices of `nodes`.

    Roots hang themselves under smaller roots until all pairs of a file are connected, which later
    files do not undo.
    """
    root = np.arange(len(nodes))
    for path in files:
        left, right = np.searchsorted(nodes, pairs_of(path)).T
        while (apart := root[left] != root[right]).any():
            one, other = root[left[apart]], root[right[apart]]
            np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
            while not np.array_equal(root, higher := root[root]):
                root = higher
    return root


def clusters(work: Path) -> None:
    """Pass 3, one task: transitive closure; per file of documents the numbers of those to drop."""
    out, part = work / "remove", work / "remove.part"
    if out.is_dir():
        return
    part.mkdir(exist_ok=True)
    files = sorted((work / "pairs").glob("*.dups"))
    nodes = np.empty(0, dtype=np.uint64)
    for path in files:
        nodes = np.union1d(nodes, pairs_of(path).ravel())
    gone = nodes[first_of_cluster(nodes, files) != np.arange(len(nodes))]
    owners = (gone >> np.uint64(32)).astype(np.int64)
    for owner in np.unique(owners):
        (gone[owners == owner] & np.uint64(2**32 - 1)).astype("<u4").tofile(
            part / f"{owner:06d}.remove"
        )
    part.rename(out)


def unique(
    documents: Path, work: Path, out: Path, excluded: Path | None, rank: int, tasks: int
) -> None:
    """Pass 4, one task per file of documents: write what stays to `out`."""
    steps = [Documents(documents), OnePerCluster(str(work / "remove"))]
    if excluded is not None:
        exclude_into(excluded, steps)
    run_task([*steps, write_documents(out)], work / "logs" / "unique", rank, tasks)
