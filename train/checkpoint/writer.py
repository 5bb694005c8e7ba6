"""Asynchronous checkpoint writer: copies shards to host memory, a thread writes and commits them.

The threads of all ranks use a process group of their own, so they neither disturb the loop's
collectives nor wait for them. A rank that cannot write reports an error code and still joins every
collective, so no rank waits for it. At most one save is in flight, in the same order on every rank.
"""

import hashlib
import logging
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
from torch import Tensor

from core.files import fsync, make_folder, sha256_of, write_json
from core.records import DamagedRecord
from core.run import MANIFEST, STEP_NAME
from model.checkpoint import STATE, TensorShard, read_state, read_tokens
from model.checkpoint_records import FORMAT
from model.hf_writer import Entry, File
from train.distributed import Ranks
from train.resilience.progress import Progress

logger = logging.getLogger(__name__)

OTHER_ERROR = 1 << 20  # code of an error without errno
WRITE_BYTES = 16 * 2**20  # of a piece of a tensor
SYNC_BYTES = 256 * 2**20
Files = dict[str, dict[str, Any]]
# folders that a killed save or removal left
PART_NAME = re.compile(rf"{STEP_NAME.pattern}(\.damaged-[0-9]{{19}})?(\.old)?\.part")


class HostBuffers:
    """Copies of this rank's tensor shards in host memory, pinned for a GPU, reused by every save.

    They take 12 bytes of host memory per parameter that the rank owns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shards: list[TensorShard] = []
        self.tensors: dict[str, Tensor] = {}

    def copy_from(
        self, shards: Iterator[tuple[TensorShard, Tensor]], beat: Callable[[], object]
    ) -> None:
        """Copy the shards, with a beat for each; on return the engine may change its state."""
        cuda = self.device.type == "cuda"
        self.shards = []
        for shard, tensor in shards:
            if shard.key not in self.tensors:
                self.tensors[shard.key] = torch.empty(shard.numel, pin_memory=cuda)
            self.tensors[shard.key].copy_(tensor.detach(), non_blocking=cuda)
            self.shards.append(shard)
            beat()
        if cuda:
            torch.cuda.current_stream(self.device).synchronize()


class CheckpointWriter:
    """Writes and commits the host buffers in a thread; all ranks start it for the same saves."""

    def __init__(self, folder: Path, ranks: Ranks, beat: Callable[[], object]) -> None:
        """`beat` is called while the loop waits for a save that goes on on any rank."""
        self.folder = folder
        self.ranks = ranks
        self.host_buffers = HostBuffers(ranks.device)
        self.group = dist.new_group(backend="gloo")
        self.progress = Progress(self.group)  # bytes, syncs and removals of saves
        self.beat = beat
        self.is_awaited = False  # only then does a save stand for the loop's progress
        self.thread: threading.Thread | None = None
        self.error: str | None = None  # of the last save, the same on every rank
        # folder name and time.time() of the last commit
        self.last_commit: tuple[str, float] | None = None
        self.collective_error: Exception | None = None  # raised when a peer is gone
        # syncs the records that a resume from the checkpoint will not write again, and returns
        # lines of them that have no room; calls its argument after each sync
        self.before_commit: Callable[[Callable[[], object]], list[str]] = lambda on_sync: []

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight."""
        return self.thread is not None and self.thread.is_alive()

    def start(self, name: str, state: dict[str, Any], on_commit: Callable[[], None]) -> None:
        """Write the host buffers as folder `name`; the first rank then calls `on_commit`."""
        assert not self.is_saving
        # a daemon, so that a process can exit while a collective waits for a dead peer
        self.thread = threading.Thread(
            target=self._work, args=(name, state, on_commit), name="checkpoint-writer", daemon=True
        )
        self.thread.start()

    def wait(self) -> str | None:
        """Wait for the save; return its error or None. Raises RuntimeError if a rank died."""
        if self.thread is not None:
            self.is_awaited = True
            self.thread.join()
            self.is_awaited = False
            self.thread = None
        if self.collective_error is not None:
            raise RuntimeError(
                "the checkpoint was not committed because a rank is gone"
            ) from self.collective_error
        return self.error

    def _work(self, name: str, state: dict[str, Any], on_commit: Callable[[], None]) -> None:
        try:
            self.error = self._save(name, state, on_commit)
            if self.error is None:
                self.last_commit = (name, time.time())
        except Exception as error:
            self.collective_error = error

    def _save(self, name: str, state: dict[str, Any], on_commit: Callable[[], None]) -> str | None:
        """Save; return the error or None. Every rank reaches every collective, even if it fails."""
        part = self.folder / f"{name}.part"
        is_first = self.ranks.is_first
        if error := self._run(lambda: self._create(part) if is_first else None):
            return error
        files: Files = {}
        error = self._run(lambda: files.update(self._write(part)))
        all_files = self._gather(files)
        if not error:
            error = self._run(
                lambda: self._commit(part, state, all_files, on_commit) if is_first else None
            )
        if error and is_first:
            shutil.rmtree(part, ignore_errors=True)  # frees the space on a full disk
        return error

    def _create(self, part: Path) -> None:
        make_folder(self.folder)
        for stale in self.folder.iterdir():
            if PART_NAME.fullmatch(stale.name) and is_folder(stale):
                shutil.rmtree(stale)
        free_name(part)
        part.mkdir()
        self.progress.add()

    def _write(self, part: Path) -> Files:
        """Write and sync this rank's tensors and their index; return sizes and SHA-256."""
        stem = f"rank-{self.ranks.rank:05d}"
        tensors, index = part / f"{stem}.safetensors", part / f"{stem}.json"
        buffers = self.host_buffers
        entry = write_tensors(
            tensors,
            {shard.key: buffers.tensors[shard.key] for shard in buffers.shards},
            self.progress.add,
        )
        write_json(index, [asdict(shard) for shard in buffers.shards])
        self.progress.add()
        return {tensors.name: entry, index.name: manifest_entry(index)}

    def _commit(
        self, part: Path, state: dict[str, Any], files: Files, on_commit: Callable[[], None]
    ) -> None:
        """Write the state and then the manifest, and rename the folder to its final name."""
        unwritten = self.before_commit(self.progress.add)
        write_json(part / STATE, {"format": FORMAT, **state, "unwritten": unwritten})
        self.progress.add()
        files = {**files, STATE: manifest_entry(part / STATE)}
        write_json(part / MANIFEST, {"files": files})
        self.progress.add()
        fsync(part)
        self.progress.add()
        final = part.with_suffix("")
        if is_folder(final) and read_tokens(final) is not None:
            remove_checkpoint(final)  # the run was resumed or rolled back to an older checkpoint
        free_name(final)
        part.rename(final)
        fsync(self.folder)
        self.progress.add()
        on_commit()

    def _run(self, action: Callable[[], Any]) -> str | None:
        """Run an action on every rank; return the error of the rank that failed, or None."""
        code = self.progress.run(
            lambda: self._error_code(action), lambda: self.is_awaited and self.beat()
        )
        return self._reduce_error(code)

    def _error_code(self, action: Callable[[], Any]) -> int:
        """Run an action; return 0, or the errno of its exception."""
        try:
            action()
        except OSError as error:
            logger.warning(f"rank {self.ranks.rank} cannot save: {error}")
            return error.errno or OTHER_ERROR
        except Exception as error:  # this rank must still join the next collective
            logger.warning(f"rank {self.ranks.rank} cannot save: {type(error).__name__}: {error}")
            return OTHER_ERROR
        return 0

    def _reduce_error(self, code: int) -> str | None:
        """All-reduce the largest error code; return its text, or None if no rank failed."""
        largest = torch.tensor([code])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        code = int(largest)
        if code == 0:
            return None
        return "see the warning above" if code == OTHER_ERROR else os.strerror(code)

    def _gather(self, files: Files) -> Files:
        """Gather size and SHA-256 of all ranks' files; zeros for a rank that failed."""
        stem = f"rank-{self.ranks.rank:05d}"
        missing = {"bytes": 0, "sha256": "00" * 32}
        rows = [files.get(f"{stem}{suffix}", missing) for suffix in (".safetensors", ".json")]
        local = torch.tensor([[row["bytes"], *bytes.fromhex(row["sha256"])] for row in rows])
        tables = [torch.empty_like(local) for _ in range(self.ranks.world_size)]
        dist.all_gather(tables, local, group=self.group)
        return {
            f"rank-{rank:05d}{suffix}": {"bytes": size, "sha256": bytes(digest).hex()}
            for rank, table in enumerate(tables)
            for suffix, (size, *digest) in zip(
                (".safetensors", ".json"), table.tolist(), strict=True
            )
        }


def write_tensors(
    path: Path, tensors: dict[str, Tensor], on_write: Callable[[int], object]
) -> dict[str, Any]:
    """Write flat fp32 tensors as a synced safetensors file; return its size and SHA-256.

    Written, hashed and synced in pieces, with `on_write` called for each, so that a slow disk shows
    progress and no sync takes long. Pieces are large: after each call the thread waits for the
    interpreter lock, which the loop holds.
    """
    file_of = File(
        path.name, [Entry(key, key, x.dtype, tuple(x.shape)) for key, x in tensors.items()]
    )
    digest = hashlib.sha256()
    unsynced = 0
    with path.open("xb", buffering=0) as file:

        def write(content: memoryview) -> None:
            nonlocal unsynced
            while content:
                size = file.write(content[:WRITE_BYTES])
                digest.update(content[:size])
                content = content[size:]
                unsynced += size
                on_write(size)
                if unsynced >= SYNC_BYTES:
                    os.fdatasync(file.fileno())
                    unsynced = 0
                    on_write(1)

        write(memoryview(file_of.header))
        for tensor in tensors.values():
            write(tensor.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
        on_write(1)
    return {"bytes": file_of.size, "sha256": digest.hexdigest()}


def manifest_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; if killed midway, it leaves a `.part` folder, which readers ignore."""
    part = folder.with_name(f"{folder.name}.old.part")
    free_name(part)
    folder.rename(part)
    shutil.rmtree(part)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder and no link to one: only such can be a checkpoint of ours."""
    return path.is_dir() and not path.is_symlink()


def is_copy(folder: Path) -> bool:
    """Whether a folder holds the state of another step than that of its name."""
    try:
        return f"step-{read_state(folder)['step']:08d}" != folder.name
    except (OSError, DamagedRecord):
        return False


def free_name(path: Path) -> None:
    """Set aside what another hand has put where a save needs the name."""
    if os.path.lexists(path):
        set_aside(path, "it is no checkpoint")


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged checkpoint, or what is none of ours and is never removed; log the reason."""
    kind = "damaged" if is_folder(path) and not is_copy(path) else "stray"
    renamed = path.with_name(f"{path.name}.{kind}-{time.time_ns()}")
    logger.warning(f"skipped {path.name}: {reason}; renamed to {renamed.name}")
    path.rename(renamed)
