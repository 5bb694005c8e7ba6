"""What lies in a folder of checkpoints, for eyes."""

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from core.run import MANIFEST, RunFiles, newest
from model.checkpoint import CheckpointReader, newest_valid, read_manifest, read_state
from train.checkpoint.manager import invalid_reason
from train.costs.memory import GIB

ROWS = 12  # tensors that diff lists at most, worst first


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a path means, newest first."""
    if folder.name.startswith("step-") and folder.is_dir():
        return [folder]
    home = RunFiles(folder).checkpoints if RunFiles(folder).checkpoints.is_dir() else folder
    found = list(newest(home))
    if not found:
        raise FileNotFoundError(
            f"no checkpoint in {home}: give a run's folder, its checkpoints, or one of them"
        )
    return found


def pair(folder: Path, other: Path | None) -> tuple[Path, Path]:
    """The two checkpoints that diff compares."""
    found = checkpoints(folder)
    if other is None:
        if len(found) < 2:
            raise FileNotFoundError(
                f"{folder} holds one checkpoint: give a second one to compare it with"
            )
        return found[1], found[0]
    return one(folder), one(other)


def one(folder: Path) -> Path:
    """The checkpoint that a path means, or the newest of several that verifies."""
    found = checkpoints(folder)
    best = found[0] if found[0] == folder else newest_valid(found[0].parent)[0]
    if best is None or invalid_reason(best) is not None:
        raise ValueError(f"{folder} has no checkpoint that verifies")
    return best


def show(found: list[Path]) -> int:
    """A line for each checkpoint."""
    table = Table("checkpoint", "step", "tokens", "updates", "ranks", "GiB", "age")
    for folder in found:
        try:
            state, files = read_state(folder), read_manifest(folder)
        except (OSError, ValueError, KeyError):
            table.add_row(folder.name, *["-"] * 5, "not readable: verify says why")
            continue
        ranks = sum(name.endswith(".safetensors") for name in files)
        size = sum(size for size, _ in files.values()) / GIB
        age = max(0.0, time.time() - (folder / MANIFEST).stat().st_mtime)
        numbers = (state["step"], state["tokens"], state["updates"], ranks)
        table.add_row(
            folder.name,
            *[f"{number:,}" for number in numbers],
            f"{size:.3f}",
            f"{age / 3600:.1f} h",
        )
    Console().print(table)
    return 0


def verify(found: list[Path]) -> int:
    """Hash everything; one line per checkpoint, as it comes."""
    bad = 0
    for folder in found:
        why = invalid_reason(folder)
        bad += why is not None
        print(f"{folder.name}: {why or 'every file is what its manifest says'}", flush=True)
    return 1 if bad else 0


def diff(left: Path, right: Path) -> int:
    """How far weights and moments lie apart, bit for bit and in size."""
    pieces = CheckpointReader(left), CheckpointReader(right)
    names = pieces[0].where.keys() | pieces[1].where.keys()
    rows = []
    for kind, name in sorted(names):
        if any((kind, name) not in side.where for side in pieces):
            rows.append((float("inf"), kind, name, "only in one of them"))
            continue
        a, b = (side.read_full(kind, name) for side in pieces)
        if a.shape != b.shape:
            rows.append((float("inf"), kind, name, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"))
        elif not torch.equal(a.view(torch.int32), b.view(torch.int32)):
            relative = float((a - b).norm() / b.norm().clamp_min(1e-30))
            rows.append(
                (
                    relative,
                    kind,
                    name,
                    f"{relative:.2e} of its norm, at most {float((a - b).abs().max()):.2e}",
                )
            )
    states = read_state(left), read_state(right)
    fields = [
        key
        for key in states[0].keys() | states[1].keys()
        if states[0].get(key) != states[1].get(key)
    ]
    print(
        f"{left} and {right}: {len(names) - len(rows)} of {len(names)} tensors are equal bit for "
        "bit"
    )
    for _, kind, name, text in sorted(rows, reverse=True)[:ROWS]:
        print(f"  {kind} {name}: {text}")
    if len(rows) > ROWS:
        print(f"  and {len(rows) - ROWS} more")
    if fields:
        print(f"  state differs in {', '.join(sorted(fields))}")
    return 1 if rows or fields else 0
