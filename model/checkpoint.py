"""The checkpoint format on disk: tensor shards by name and slice, without pickle.

A checkpoint folder holds `rank-NNNNN.safetensors` (flat fp32 tensor shards), `rank-NNNNN.json` (a
TensorShard each), `state.json` (position in the token stream and other state) and `manifest.json`
(size and SHA-256 of every other file, written last). A TensorShard is a range of the flattened
shard of one tensor-parallel rank, so any layout of ranks can read the checkpoint of any other. A
read costs the bytes it returns; the index grows with tensors x ranks, not with parameters.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from core.files import sha256_of
from core.run import MANIFEST, iter_checkpoints
from model.parameters import shard_spec
from model.sharding import shard

STATE = "state.json"
FORMAT = 1


@dataclass(frozen=True)
class TensorShard:
    """Elements [start, start + numel) of the flattened shard of tensor `name` on rank tp_rank."""

    kind: str  # "param", "exp_avg" or "exp_avg_sq"
    name: str
    shape: tuple[int, ...]  # of the full tensor
    tp_rank: int
    tp_size: int
    start: int
    numel: int

    @property
    def key(self) -> str:
        """Name of the tensor in its safetensors file."""
        return f"{self.kind}/{self.name}/{self.tp_rank}/{self.start}"


def shard_shape(name: str, shape: tuple[int, ...], tp_size: int) -> tuple[int, ...]:
    """Return the shape of one of tp_size ranks' shard of a tensor."""
    spec = shard_spec(name)
    if spec is None or tp_size == 1:
        return shape
    return tuple(
        extent // tp_size if axis == spec.dim else extent for axis, extent in enumerate(shape)
    )


class CheckpointReader:
    """Reads full tensors, rows and ranges from the shards of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[tuple[str, str], list[tuple[TensorShard, Path]]] = {}
        # files that the manifest does not list were not verified and are not read
        for name in read_manifest(folder):
            if name.startswith("rank-") and name.endswith(".json"):
                path = folder / name
                for raw in json.loads(path.read_text(encoding="utf-8")):
                    entry = TensorShard(**{**raw, "shape": tuple(raw["shape"])})
                    self.where.setdefault((entry.kind, entry.name), []).append(
                        (entry, path.with_suffix(".safetensors"))
                    )

    def read_full(self, kind: str, name: str) -> Tensor:
        """Return a full tensor, fp32 on the CPU."""
        return self.read_rows(kind, name, 0, self.where[kind, name][0][0].shape[0])

    def read_rows(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a full tensor, fp32 on the CPU; reads only those."""
        entry = self.where[kind, name][0][0]
        spec, size = shard_spec(name), entry.tp_size
        shape = shard_shape(name, entry.shape, size)
        width = prod(shape[1:])
        if spec is None or size == 1 or spec.dim:
            ranks = range(1 if spec is None else size)
            slices = [
                self._flat(kind, name, rank, start * width, (stop - start) * width)
                for rank in ranks
            ]
            slices = [x.view(stop - start, *shape[1:]) for x in slices]
            return torch.cat(slices, 1) if len(slices) > 1 else slices[0]
        rows_per_run = shape[0] // spec.blocks  # consecutive rows that one rank holds
        out = []
        while start < stop:
            # runs are dealt to ranks 0 to size - 1 within the first block, then the next
            run, offset = divmod(start, rows_per_run)
            count = min(rows_per_run - offset, stop - start)
            local = run // size * rows_per_run + offset
            out.append(
                self._flat(kind, name, run % size, local * width, count * width).view(
                    count, *shape[1:]
                )
            )
            start += count
        return torch.cat(out) if len(out) > 1 else out[0]

    def read_range(
        self, kind: str, name: str, tp_rank: int, tp_size: int, start: int, numel: int
    ) -> Tensor:
        """Return a range of the flattened shard of rank tp_rank of tp_size."""
        if (kind, name) not in self.where:
            raise KeyError(f"{self.folder} has no {kind} of {name}")
        if self.where[kind, name][0][0].tp_size == tp_size or shard_spec(name) is None:
            rank = tp_rank if shard_spec(name) is not None else 0
            return self._flat(kind, name, rank, start, numel)
        return shard(name, self.read_full(kind, name), tp_rank, tp_size).flatten()[
            start : start + numel
        ]

    def _flat(self, kind: str, name: str, tp_rank: int, start: int, numel: int) -> Tensor:
        out = torch.empty(numel)
        filled = start  # shards must follow each other without gap or overlap
        for entry, path in sorted(self.where[kind, name], key=lambda pair: pair[0].start):
            low = max(start, entry.start)
            high = min(start + numel, entry.start + entry.numel)
            if entry.tp_rank != tp_rank or low >= high:
                continue
            if low != filled:
                break
            with safe_open(path, framework="pt") as file:
                out[low - start : high - start] = file.get_slice(entry.key)[
                    low - entry.start : high - entry.start
                ]
            filled = high
        if filled != start + numel:
            raise ValueError(
                f"{self.folder} does not hold elements {filled} to {start + numel} of {kind} {name}"
            )
        return out


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Read a checkpoint's manifest: file name -> (size in bytes, SHA-256)."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {
        str(name): (int(entry["bytes"]), str(entry["sha256"]))
        for name, entry in manifest["files"].items()
    }


def verify_checkpoint(folder: Path) -> str | None:
    """Return why a checkpoint is invalid, or None; reads and hashes every file of its manifest."""
    try:
        files = read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    ranks = sorted(
        name.removesuffix(".json") for name in files if name.endswith(".json") and name != STATE
    )
    expected = {STATE} | {
        f"{rank}{suffix}" for rank in ranks for suffix in (".json", ".safetensors")
    }
    if (
        not ranks
        or set(files) != expected
        or ranks != [f"rank-{number:05d}" for number in range(len(ranks))]
    ):
        return f"{MANIFEST} does not list {STATE} and two files of every rank"
    for name, (size, sha256) in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is missing or not a plain file of the folder"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256_of(path) != sha256:
            return f"{name} does not hash to its manifest's SHA-256"
    try:
        version = read_state(folder).get("format")
    except (ValueError, AttributeError):
        return f"{STATE} is not a JSON object"
    return None if version == FORMAT else f"its format is {version}, this code reads {FORMAT}"


def newest_valid(checkpoints: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest valid checkpoint, and why each newer one is invalid."""
    errors: dict[Path, str] = {}
    for folder in iter_checkpoints(checkpoints):
        why = verify_checkpoint(folder)
        if why is None:
            return folder, errors
        errors[folder] = why
    return None, errors


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state
