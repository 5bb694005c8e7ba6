"""MinHash near duplicates in a source: datatrove's signatures, pairs and filter, own clustering.

datatrove needs the same tasks and reader in its first and last step, and silently removes wrong
documents if they differ. Here both steps read the files of the previous pass, task by task.
datatrove's clustering holds a dictionary of about 300 bytes per document with a duplicate, and the
document it keeps depends on the order of unions. This clustering holds 16 bytes per such document
and the pairs of one bucket, and keeps the first document of each cluster.

A signature takes 8 bytes per hash and 4 per bucket and document on disk: 952 bytes for 14x8, 11,532
for 93x15.
"""

from pathlib import Path

import numpy as np
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from numpy.typing import NDArray

from core.files import make_folder, publish_folder
from data.pipeline.tasks import Documents, document_writer, run_task, set_exclusion_writers

REQUIRES = ("spacy", "xxhash")
VERSION = 1  # raise with the documents that it keeps or removes
N_GRAMS = 5  # words; RefinedWeb and FineWeb


def parse_config(setting: str) -> MinhashConfig:
    """Parse "<buckets>x<hashes per bucket>"."""
    buckets, hashes = map(int, setting.split("x"))
    return MinhashConfig(n_grams=N_GRAMS, num_buckets=buckets, hashes_per_bucket=hashes)


class OnePerCluster(MinhashDedupFilter):
    """Keeps one document of every cluster of near duplicates."""

    name = "Near duplicates"


def signatures(setting: str, documents: Path, work: Path, rank: int, tasks: int) -> None:
    """Pass 1, one task per file of documents."""
    step = MinhashDedupSignature(str(work / "signatures"), parse_config(setting))
    run_task([Documents(documents), step], work / "logs" / "signatures", rank, tasks)


def buckets(setting: str, work: Path, rank: int) -> None:
    """Pass 2, one task per bucket: pairs of documents with the same signature."""
    config = parse_config(setting)
    step = MinhashDedupBuckets(str(work / "signatures"), str(work / "pairs"), config=config)
    run_task([step], work / "logs" / "buckets", rank, config.num_buckets)


def read_pairs(path: Path) -> NDArray[np.uint64]:
    """The pairs of one bucket, uint64 [pairs, 2]; a document is (file number << 32) + its index."""
    halves = np.fromfile(path, dtype="<u4").reshape(-1, 2).astype(np.uint64)
    return (halves[:, 0] << np.uint64(32) | halves[:, 1]).reshape(-1, 2)


def cluster_roots(nodes: NDArray[np.uint64], files: list[Path]) -> NDArray[np.int64]:
    """Index of the smallest node in each node's cluster, int64 [nodes].

    `nodes` is sorted. Union-find on arrays: all pairs of a file are merged before the next file is
    read, and later files never separate them.
    """
    root = np.arange(len(nodes))
    for path in files:
        left, right = np.searchsorted(nodes, read_pairs(path)).T
        while (separate := root[left] != root[right]).any():
            left_root, right_root = root[left[separate]], root[right[separate]]
            np.minimum.at(
                root, np.maximum(left_root, right_root), np.minimum(left_root, right_root)
            )
            while not np.array_equal(root, parent := root[root]):
                root = parent
    return root


def clusters(work: Path) -> None:
    """Pass 3, one task: write the indices of the documents to remove, per file of documents."""
    out = work / "remove"
    part = work / "remove.part"
    if out.is_dir():
        return
    make_folder(part)
    files = sorted((work / "pairs").glob("*.dups"))
    nodes = np.empty(0, dtype=np.uint64)
    for path in files:
        nodes = np.union1d(nodes, read_pairs(path).ravel())
    removed = nodes[cluster_roots(nodes, files) != np.arange(len(nodes))]
    file_numbers = (removed >> np.uint64(32)).astype(np.int64)
    indices = (removed & np.uint64(2**32 - 1)).astype("<u4")
    for number in np.unique(file_numbers):
        indices[file_numbers == number].tofile(part / f"{number:06d}.remove")
    publish_folder(part, out)


def unique(
    documents: Path, work: Path, out: Path, excluded: Path | None, rank: int, tasks: int
) -> None:
    """Pass 4, one task per file of documents: write the remaining documents to `out`."""
    steps = [Documents(documents), OnePerCluster(str(work / "remove"))]
    if excluded is not None:
        set_exclusion_writers(excluded, steps)
    run_task([*steps, document_writer(out)], work / "logs" / "unique", rank, tasks)
