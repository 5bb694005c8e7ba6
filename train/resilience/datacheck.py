"""Whether the token shards are what their manifests say.

One rank of each node reads the manifests and checks names, sizes and folders of all files; the
others receive them. Every rank hashes its share of the files: `before` holds the run until all are
hashed; `background` trains meanwhile and stops the run at the first bad file.
Cost: the corpus is read once per start, shared by all ranks (11.6 TB at 5.8T tokens: 45 GB for each
of 256 ranks).
"""

import json
import logging
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

from core.errors import InputError
from core.files import sha256_of
from data.config import DataConfig
from data.stream.manifests import Manifest, open_manifests, parse_manifest, source_folder
from train.distributed import Ranks, broadcast_text, raise_on_all_ranks
from train.resilience.config import VerifyShards

logger = logging.getLogger(__name__)

SAY_SECONDS = 10.0


def open_per_node(config: DataConfig) -> dict[str, Manifest]:
    """Manifests of all sources on every rank, opened and checked by the first rank of each node.

    Raises InputError on every rank when one of those finds a fault, or other manifests than rank 0.
    """
    opened: dict[str, Manifest] | None = None
    why = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            opened = open_manifests(config)
        except (InputError, OSError) as error:
            why = str(error)
    raise_on_all_ranks(why)
    text = json.dumps({name: asdict(manifest) for name, manifest in (opened or {}).items()})
    shared = {name: parse_manifest(raw) for name, raw in json.loads(broadcast_text(text)).items()}
    raise_on_all_ranks(
        None
        if opened is None or opened == shared
        else f"{os.uname().nodename} has other manifests in {Path(config.folder).resolve()} than "
        "the first node: mount the same data.folder on every node"
    )
    return shared


class DataCheck:
    """This rank's share of the files."""

    def __init__(self, config: DataConfig, manifests: dict[str, Manifest], ranks: Ranks) -> None:
        files = [
            (source_folder(config, name), file)
            for name, manifest in sorted(manifests.items())
            for file in manifest.splits["train"]
        ]
        self.files = files[ranks.rank :: ranks.world_size]
        self.is_first = ranks.is_first
        self.error: str | None = None

    def start(self, mode: VerifyShards) -> None:
        """Hash now, in the background, or never; raises InputError on every rank for a bad file."""
        if mode is VerifyShards.before:
            self._work()
            raise_on_all_ranks(self.error)
        elif mode is VerifyShards.background:
            threading.Thread(target=self._work, name="datacheck", daemon=True).start()

    def _work(self) -> None:
        done, total = 0, sum(file.tokens for _, file in self.files)
        said = time.monotonic()
        for folder, file in self.files:
            path = folder / file.name
            try:
                good = sha256_of(path) == file.sha256
                why = "differs from its manifest (SHA-256)"
            except OSError as error:
                good, why = False, f"cannot be read ({error})"
            if not good:
                self.error = (
                    f"shard {path} {why}: restore it, or remove {folder} and prepare the data again"
                )
                return
            done += file.tokens
            if self.is_first and time.monotonic() > said + SAY_SECONDS:
                said = time.monotonic()
                logger.info(f"verified {done / total:.0%} of the shards of this rank")
