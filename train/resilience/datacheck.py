"""Verify token shards against their manifests.

One rank per node and storage reads the manifests and checks names and sizes of all files; the other
ranks receive them. The files are distributed for hashing over the ranks that see the same storage:
`before` delays training until all are hashed; `background` trains meanwhile and stops the run at
the first bad file.
Cost: all ranks together read a shared corpus once per start (11.6 TB at 5.8T tokens: 45 GB for each
of 256 ranks), and a copy on every node once per node.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from core.errors import InputError
from core.files import sha256_of
from core.records import parse_typed
from data.config import DataConfig
from data.stream.manifests import MANIFEST, Manifest, open_manifests, source_folder
from train.distributed import Ranks, broadcast_text, gather_hashes, raise_on_all_ranks
from train.resilience.config import VerifyShards
from train.resilience.progress import Progress

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0


def open_per_node(config: DataConfig) -> dict[str, Manifest]:
    """Return all manifests on every rank; the first rank of each node and storage checks them.

    Raises InputError on every rank if one of those finds an error, or differs from rank 0.
    """
    opened: dict[str, Manifest] | None = None
    error = None
    rank = dist.get_rank()
    if rank == ranks_of_storage(config)[0] or os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            opened = open_manifests(config)
        except (InputError, OSError) as exception:
            error = str(exception)
    raise_on_all_ranks(error)
    text = json.dumps({name: asdict(manifest) for name, manifest in (opened or {}).items()})
    shared = parse_typed(broadcast_text(text), dict[str, Manifest], "manifests of rank 0")
    raise_on_all_ranks(
        None
        if opened is None or opened == shared
        else f"rank {rank} on {os.uname().nodename} has other manifests in "
        f"{Path(config.folder).resolve()} than rank 0: mount the same data.folder on every node"
    )
    return shared


def ranks_of_storage(config: DataConfig) -> list[int]:
    """The ranks that see the same files of data.folder as this rank. A collective.

    The storage's server sets a file's time of change (ctime), so ranks of a shared folder agree on
    it whatever their path and clock, and no copy has the same times.
    """
    times = []
    for name in config.sources:
        with suppress(OSError):
            times.append((source_folder(config, name) / MANIFEST).stat().st_ctime_ns)
    hashes = gather_hashes(str(times))
    return [rank for rank, each in enumerate(hashes) if each == hashes[dist.get_rank()]]


class DataCheck:
    """Hashes this rank's share of the shards."""

    def __init__(self, config: DataConfig, manifests: dict[str, Manifest], ranks: Ranks) -> None:
        files = [
            (source_folder(config, name), file)
            for name, manifest in sorted(manifests.items())
            for file in manifest.splits["train"]
        ]
        sharing = ranks_of_storage(config)
        self.files = files[sharing.index(ranks.rank) :: len(sharing)]
        if ranks.is_first and len(sharing) < ranks.world_size:
            logger.info(f"{len(sharing)} ranks see this data.folder; others verify their copies")
        self.rank = ranks.rank
        self.is_first = ranks.is_first
        self.error: str | None = None
        self.progress = Progress()

    def start(self, mode: VerifyShards, beat: Callable[[], object]) -> None:
        """Hash now, in the background or never. Raises InputError on every rank for a bad file.

        `beat` is called while ranks hash before training.
        """
        if mode is VerifyShards.before:
            self.progress.run(self._work, beat)
            raise_on_all_ranks(self.error)
        elif mode is VerifyShards.background:
            threading.Thread(target=self._work, name="datacheck", daemon=True).start()

    def _work(self) -> None:
        hashed_tokens = 0
        total = sum(file.tokens for _, file in self.files)
        logged_at = time.monotonic()
        for folder, file in self.files:
            path = folder / file.name
            try:
                error = None
                if sha256_of(path, self.progress.add) != file.sha256:
                    error = "differs from its manifest (SHA-256)"
            except OSError as exception:
                error = f"cannot be read ({exception})"
            if error is not None:
                self.error = (
                    f"shard {path} on {os.uname().nodename} (rank {self.rank}) {error}: restore "
                    f"it, or remove {folder} and prepare the data again"
                )
                return
            hashed_tokens += file.tokens
            if self.is_first and time.monotonic() > logged_at + LOG_SECONDS:
                logged_at = time.monotonic()
                logger.info(f"verified {hashed_tokens / total:.0%} of the shards of this rank")
