"""The whole training state on disk: committed at once or not at all, verified before use, free of pickle.

Commit: every rank writes its pieces into `step-N.part` and syncs them; sizes and SHA-256 are gathered; the first rank
writes the state and, last, the manifest, then renames the folder to `step-N`; only after that older ones are removed.
A reader sees a complete folder or none, and a damaged one is passed over for the newest that verifies.
Cost: each rank writes 12 bytes per parameter it owns (weights and two moments, fp32); the loop waits for it.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from model.weights import FORMAT, MANIFEST, STATE, Pieces, newest, newest_valid, read_state, sha256_of
from train.config import CheckpointConfig
from train.distributed import Ranks
from train.engine import Engine


@dataclass
class State:
    """Where a run stands; everything else follows from the config."""

    tokens: int  # of the run's stream that have been trained on
    step: int
    updates: int  # steps whose update was not skipped
    plan: str  # hash of the data order
    model: dict[str, Any]


class Checkpoints:
    """The checkpoint folder of one run, shared by its ranks."""

    def __init__(self, folder: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        self.folder = folder
        self.config = config
        self.ranks = ranks

    def find(self) -> Path | None:
        """The newest checkpoint that verifies, the same on every rank; the first rank reads and hashes it."""
        step = torch.full((1,), -1, dtype=torch.int64)
        if self.ranks.first:
            found, faults = newest_valid(self.folder)
            for damaged, why in faults.items():
                # out of the way: retention counts good ones, and the step will be saved anew
                aside = damaged.with_name(f"{damaged.name}.damaged-{time.time_ns()}")
                print(f"warning: checkpoint {damaged} is not used: {why}; it is kept as {aside.name}", flush=True)
                damaged.rename(aside)
            if found is not None:
                step[0] = int(found.name.removeprefix("step-"))
        dist.broadcast(step, src=0)
        return None if step < 0 else self.folder / f"step-{int(step):08d}"

    def load(self, folder: Path, engine: Engine) -> State:
        """Fill the engine from a verified checkpoint, whatever layout of ranks wrote it."""
        state = State(**{key: value for key, value in read_state(folder).items() if key != "format"})
        engine.load(Pieces(folder), state.updates)
        return state

    def save(self, state: State, engine: Engine) -> Path:
        """Commit the training state; every rank takes part."""
        final = self.folder / f"step-{state.step:08d}"
        part = final.with_suffix(".part")
        if self.ranks.first:
            for stale in self.folder.glob("*.part"):
                shutil.rmtree(stale)
            if final.exists():  # this step was saved before, and the run went on from an older one: replace it
                shutil.rmtree(final)
            part.mkdir(parents=True)
        dist.barrier()
        files = self._gather(part, self._write_pieces(part, engine))
        if self.ranks.first:
            write_synced(part / STATE, {"format": FORMAT, **asdict(state)})
            files[STATE] = {"bytes": (part / STATE).stat().st_size, "sha256": sha256_of(part / STATE)}
            write_synced(part / MANIFEST, {"files": files})
            sync_folder(part)
            part.rename(final)
            sync_folder(self.folder)
            self._retain()
        dist.barrier()
        return final

    def _write_pieces(self, part: Path, engine: Engine) -> list[str]:
        """This rank's tensors and their index; returns the names of both files."""
        pieces = list(engine.pieces())
        stem = f"rank-{self.ranks.rank:05d}"
        save_file({piece.key: tensor for piece, tensor in pieces}, part / f"{stem}.safetensors")
        with (part / f"{stem}.safetensors").open("rb") as file:
            os.fsync(file.fileno())
        write_synced(part / f"{stem}.json", [asdict(piece) for piece, _ in pieces])
        return [f"{stem}.safetensors", f"{stem}.json"]

    def _gather(self, part: Path, names: list[str]) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every rank's files, hashed by the rank that wrote them."""
        rows = [[(part / name).stat().st_size, *bytes.fromhex(sha256_of(part / name))] for name in names]
        mine = torch.tensor(rows, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.ranks.world_size)]
        dist.all_gather(everyone, mine)
        files = {}
        for rank, table in enumerate(everyone):
            for suffix, (size, *digest) in zip((".safetensors", ".json"), table.tolist(), strict=True):
                files[f"rank-{rank:05d}{suffix}"] = {"bytes": size, "sha256": bytes(digest).hex()}
        return files

    def _retain(self) -> None:
        for old in list(newest(self.folder))[self.config.keep_last :]:
            shutil.rmtree(old)
        sync_folder(self.folder)


def write_synced(path: Path, value: Any) -> None:
    """Write JSON under another name, sync it, and rename it into place."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def sync_folder(folder: Path) -> None:
    """Make renames and removals inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
