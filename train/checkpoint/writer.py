"""A checkpoint on its way to disk: copied to host memory, then written and committed by a thread.

The threads of all ranks agree over a process group of their own, so they neither disturb the loop's
collectives nor wait for them; a rank that cannot write says so instead of staying away, so nobody
waits for it. At most one save is in flight, in the same order on every rank.
"""

import hashlib
import logging
import mmap
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from core.files import sync_folder, write_json
from core.run import MANIFEST
from model.checkpoint import FORMAT, STATE, TensorShard
from train.distributed import Ranks

logger = logging.getLogger(__name__)

OTHER_ERROR = 1 << 20  # stands for an error that has no errno
Files = dict[str, dict[str, Any]]


class HostCopy:
    """This rank's pieces in host memory, in buffers that are kept from save to save (pinned beside
    a GPU).

    Costs 12 bytes of host memory per parameter that the rank owns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shards: list[TensorShard] = []
        self.tensors: dict[str, Tensor] = {}

    def take(self, shards: Iterator[tuple[TensorShard, Tensor]]) -> None:
        """Copy; on return the engine may change its state."""
        cuda = self.device.type == "cuda"
        self.shards = []
        for shard, tensor in shards:
            if shard.key not in self.tensors:
                self.tensors[shard.key] = torch.empty(shard.numel, pin_memory=cuda)
            self.tensors[shard.key].copy_(tensor.detach(), non_blocking=cuda)
            self.shards.append(shard)
        if cuda:
            torch.cuda.current_stream(self.device).synchronize()


class Writer:
    """Commits one host copy at a time in the background; all ranks start it for the same saves."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self.ranks = ranks
        self.copy = HostCopy(ranks.device)
        self.group = dist.new_group(backend="gloo")
        self.thread: threading.Thread | None = None
        self.error: str | None = None  # of the last save, the same on every rank
        # the last folder that was committed, and when (time.time)
        self.done: tuple[str, float] | None = None
        self.broken: Exception | None = None  # a peer is gone, and the ranks could not agree

    @property
    def busy(self) -> bool:
        """Whether a save is on its way."""
        return self.thread is not None and self.thread.is_alive()

    def start(self, name: str, state: dict[str, Any], committed: Callable[[], None]) -> None:
        """Write the host copy as folder `name`; the first rank calls `committed` afterwards."""
        assert not self.busy
        # a daemon, so that a process whose peers are gone can leave
        self.thread = threading.Thread(
            target=self._work, args=(name, state, committed), name="checkpoint-writer", daemon=True
        )
        self.thread.start()

    def wait(self) -> str | None:
        """Wait for the save; returns why it failed, or None. Raises RuntimeError if a rank died."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.broken is not None:
            raise RuntimeError("a checkpoint was left behind, for a rank is gone") from self.broken
        return self.error

    def _work(self, name: str, state: dict[str, Any], committed: Callable[[], None]) -> None:
        try:
            self.error = self._save(name, state, committed)
            if self.error is None:
                self.done = (name, time.time())
        except Exception as error:
            self.broken = error

    def _save(self, name: str, state: dict[str, Any], committed: Callable[[], None]) -> str | None:
        """Every collective below is reached by every rank, whatever fails on one of them."""
        part = self.folder / f"{name}.part"
        if why := self._agree(self._try(lambda: self._begin(part)) if self.ranks.is_first else 0):
            return why
        files: Files = {}
        code = self._try(lambda: files.update(self._write(part)))
        everyone = self._gather(files)
        if not (why := self._agree(code)):
            code = (
                self._try(lambda: self._commit(part, state, everyone, committed))
                if self.ranks.is_first
                else 0
            )
            why = self._agree(code)
        if why and self.ranks.is_first:
            shutil.rmtree(part, ignore_errors=True)  # what a full disk needs most
        return why

    def _begin(self, part: Path) -> None:
        for stale in self.folder.glob("*.part"):
            shutil.rmtree(stale)
        part.mkdir(parents=True)

    def _write(self, part: Path) -> Files:
        """This rank's tensors and their index, synced; returns their sizes and SHA-256."""
        stem = f"rank-{self.ranks.rank:05d}"
        tensors, index = part / f"{stem}.safetensors", part / f"{stem}.json"
        save_file({shard.key: self.copy.tensors[shard.key] for shard in self.copy.shards}, tensors)
        with tensors.open("rb") as file:
            os.fsync(file.fileno())
        write_json(index, [asdict(shard) for shard in self.copy.shards])
        return {path.name: entry(path) for path in (tensors, index)}

    def _commit(
        self, part: Path, state: dict[str, Any], files: Files, committed: Callable[[], None]
    ) -> None:
        """Manifest last, then the folder's name; an older folder of that name goes before."""
        write_json(part / STATE, {"format": FORMAT, **state})
        files = {**files, STATE: entry(part / STATE)}
        write_json(part / MANIFEST, {"files": files})
        sync_folder(part)
        final = part.with_suffix("")
        if final.exists():  # saved before, and the run went on from an older one
            remove(final)
        part.rename(final)
        sync_folder(self.folder)
        committed()

    def _try(self, action: Callable[[], Any]) -> int:
        """Errno of what an action raised, 0 when it did not."""
        try:
            action()
        except OSError as error:
            logger.warning(f"rank {self.ranks.rank} cannot save: {error}")
            return error.errno or OTHER_ERROR
        except Exception as error:  # whatever it is, the ranks must still meet
            logger.warning(f"rank {self.ranks.rank} cannot save: {type(error).__name__}: {error}")
            found = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors passes one on
            return int(found[1]) if found else OTHER_ERROR
        return 0

    def _agree(self, code: int) -> str | None:
        """The largest code of all ranks in words."""
        worst = torch.tensor([code])
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.group)
        found = int(worst)
        return (
            None
            if found == 0
            else "see the warning above"
            if found == OTHER_ERROR
            else os.strerror(found)
        )

    def _gather(self, files: Files) -> Files:
        """Size and SHA-256 of every rank's files; zeros for those of a rank that failed."""
        stem = f"rank-{self.ranks.rank:05d}"
        none = {"bytes": 0, "sha256": "00" * 32}
        rows = [files.get(f"{stem}{suffix}", none) for suffix in (".safetensors", ".json")]
        mine = torch.tensor([[row["bytes"], *bytes.fromhex(row["sha256"])] for row in rows])
        tables = [torch.empty_like(mine) for _ in range(self.ranks.world_size)]
        dist.all_gather(tables, mine, group=self.group)
        return {
            f"rank-{rank:05d}{suffix}": {"bytes": size, "sha256": bytes(digest).hex()}
            for rank, table in enumerate(tables)
            for suffix, (size, *digest) in zip(
                (".safetensors", ".json"), table.tolist(), strict=True
            )
        }


def entry(path: Path) -> dict[str, Any]:
    """A file's line in a manifest; hashed in one call, which releases the GIL for the loop."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def remove(folder: Path) -> None:
    """Remove a checkpoint; a kill on the way leaves a `.part`, which nobody takes for one."""
    part = folder.with_name(f"{folder.name}.old.part")
    folder.rename(part)
    shutil.rmtree(part)
