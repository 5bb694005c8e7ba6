"""Tensors on disk without pickle: checkpoints as pieces by name and slice, and folders of
safetensors files.

A checkpoint folder holds `rank-NNNNN.safetensors` (flat fp32 pieces), `rank-NNNNN.json` (what each
piece is), `state.json` (the run's place in its token stream) and `manifest.json` (size and SHA-256
of every other file, written last). A piece is a range of the flattened part of a tensor that one
tensor-parallel rank holds, so any layout of ranks can read any other's. Reading costs the bytes
asked for; indices grow with tensors x ranks, not with parameters.
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
from core.run import MANIFEST, newest
from model.parameters import shard_spec
from model.sharding import shard

STATE = "state.json"
FORMAT = 1


@dataclass(frozen=True)
class TensorShard:
    """Elements [start, start + numel) of tensor `name`'s flattened part on rank tp_rank."""

    kind: str  # "param", "exp_avg" or "exp_avg_sq"
    name: str
    shape: tuple[int, ...]  # of the full tensor
    tp_rank: int
    tp_size: int
    start: int
    numel: int

    @property
    def key(self) -> str:
        """Name of the piece inside its safetensors file."""
        return f"{self.kind}/{self.name}/{self.tp_rank}/{self.start}"


def shard_shape(name: str, shape: tuple[int, ...], tp_size: int) -> tuple[int, ...]:
    """Shape of the part of a tensor that one of tp_size ranks holds."""
    spec = shard_spec(name)
    if spec is None or tp_size == 1:
        return shape
    return tuple(
        extent // tp_size if axis == spec.dim else extent for axis, extent in enumerate(shape)
    )


class CheckpointReader:
    """The tensors of one checkpoint folder, assembled on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[tuple[str, str], list[tuple[TensorShard, Path]]] = {}
        # a file that it does not name was not verified and is not read
        for name in read_manifest(folder):
            if name.startswith("rank-") and name.endswith(".json"):
                path = folder / name
                for raw in json.loads(path.read_text(encoding="utf-8")):
                    entry = TensorShard(**{**raw, "shape": tuple(raw["shape"])})
                    self.where.setdefault((entry.kind, entry.name), []).append(
                        (entry, path.with_suffix(".safetensors"))
                    )

    def read_full(self, kind: str, name: str) -> Tensor:
        """The whole tensor, fp32 on the CPU."""
        return self.read_rows(kind, name, 0, self.where[kind, name][0][0].shape[0])

    def read_rows(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a full tensor, fp32 on the CPU; takes little more memory."""
        entry = self.where[kind, name][0][0]
        spec, size = shard_spec(name), entry.tp_size
        shape = shard_shape(name, entry.shape, size)
        width = prod(shape[1:])
        if spec is None or size == 1 or spec.dim:
            ranks = range(1 if spec is None else size)
            parts = [
                self._flat(kind, name, rank, start * width, (stop - start) * width)
                for rank in ranks
            ]
            parts = [part.view(stop - start, *shape[1:]) for part in parts]
            return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        run, out = shape[0] // spec.blocks, []  # rows that lie together on one rank
        while start < stop:
            # blocks go over the ranks of the first part, then of the next
            block, inside = divmod(start, run)
            count = min(run - inside, stop - start)
            local = block // size * run + inside
            out.append(
                self._flat(kind, name, block % size, local * width, count * width).view(
                    count, *shape[1:]
                )
            )
            start += count
        return torch.cat(out) if len(out) > 1 else out[0]

    def read_range(
        self, kind: str, name: str, tp_rank: int, tp_size: int, start: int, numel: int
    ) -> Tensor:
        """Range of the flattened part of rank tp_rank of tp_size, whatever layout was saved."""
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
        filled = start  # pieces follow each other without gap or overlap
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
    """File name -> (size in bytes, SHA-256) of a checkpoint's manifest."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {
        str(name): (int(entry["bytes"]), str(entry["sha256"]))
        for name, entry in manifest["files"].items()
    }


def verify_checkpoint(folder: Path) -> str | None:
    """Why a checkpoint must not be read, or None; reads and hashes every file of its manifest."""
    try:
        files = read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    ranks = sorted(
        name.removesuffix(".json") for name in files if name.endswith(".json") and name != STATE
    )
    wanted = {STATE} | {f"{rank}{suffix}" for rank in ranks for suffix in (".json", ".safetensors")}
    if (
        not ranks
        or set(files) != wanted
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
        found = read_state(folder).get("format")
    except (ValueError, AttributeError):
        return f"{STATE} is not a JSON object"
    return None if found == FORMAT else f"its format is {found}, this code reads {FORMAT}"


def newest_valid(checkpoints: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one."""
    faults: dict[Path, str] = {}
    for folder in newest(checkpoints):
        why = verify_checkpoint(folder)
        if why is None:
            return folder, faults
        faults[folder] = why
    return None, faults


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state
