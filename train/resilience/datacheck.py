"""Whether the token shards are what their manifests say: every rank hashes its share of the files.

`before` holds the run until all are hashed; `background` trains meanwhile and stops the run at the
first bad file; sizes, names and folders are checked in any case when manifests are read
(data/stream/manifests.py).
Cost: the corpus is read once per start, shared by all ranks (11.6 TB at 5.8T tokens: 45 GB for each
of 256 ranks).
"""

import logging
import threading
import time

from core.files import sha256_of
from data.config import DataConfig
from data.stream.manifests import Manifest, source_folder
from train.config import VerifyShards
from train.distributed import Ranks, raise_everywhere

logger = logging.getLogger(__name__)

SAY_SECONDS = 10.0


class DataCheck:
    """This rank's share of the files."""

    def __init__(self, config: DataConfig, manifests: dict[str, Manifest], ranks: Ranks) -> None:
        files = [
            (source_folder(config, name), file)
            for name, manifest in sorted(manifests.items())
            for file in manifest.splits["train"]
        ]
        self.files = files[ranks.rank :: ranks.world_size]
        self.first = ranks.first
        self.fault: str | None = None

    def start(self, mode: VerifyShards) -> None:
        """Hash now, in the background, or not at all; raises InputError on every rank when a file
        is bad.
        """
        if mode is VerifyShards.before:
            self._work()
            raise_everywhere(self.fault)
        elif mode is VerifyShards.background:
            threading.Thread(target=self._work, name="datacheck", daemon=True).start()

    def _work(self) -> None:
        done, total = 0, sum(file.tokens for _, file in self.files)
        said = time.monotonic()
        for folder, file in self.files:
            path = folder / file.name
            try:
                good = sha256_of(path) == file.sha256
                why = "does not hash to its manifest's SHA-256"
            except OSError as error:
                good, why = False, f"is not readable ({error})"
            if not good:
                self.fault = (
                    f"shard {path} {why}: restore it, or remove {folder} and prepare the data again"
                )
                return
            done += file.tokens
            if self.first and time.monotonic() > said + SAY_SECONDS:
                said = time.monotonic()
                logger.info(f"shards: {done / total:.0%} of this rank's share verified")
