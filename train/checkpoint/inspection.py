"""List, verify and compare checkpoints on the command line (train/checkpoints.py)."""

import time
from pathlib import Path

import torch
from rich.table import Table

from core.console import table_console
from core.errors import InputError
from core.run import MANIFEST
from model.checkpoint import CheckpointReader, read_manifest, read_state, verify_checkpoint
from model.find_checkpoint import list_checkpoints, resolve_checkpoint
from train.costs.memory import GIB

MAX_ROWS = 12  # differing tensors that diff prints, largest difference first


def resolve_pair(path: Path, other: Path | None) -> tuple[Path, Path]:
    """Return the two checkpoints to compare: of both paths, or the newest two of one."""
    if other is not None:
        return resolve_checkpoint(path), resolve_checkpoint(other)
    checkpoints = list_checkpoints(path)
    if len(checkpoints) < 2:
        raise FileNotFoundError(f"{path} holds one checkpoint: give a second one to compare with")
    return checkpoints[1], checkpoints[0]


def print_table(checkpoints: list[Path]) -> int:
    """Print a row per checkpoint; return the exit code."""
    table = Table("checkpoint", "step", "tokens", "updates", "ranks", "GiB", "age")
    for folder in checkpoints:
        try:
            state, files = read_state(folder), read_manifest(folder)
        except (OSError, InputError):
            table.add_row(folder.name, *["-"] * 5, "not readable: verify says why")
            continue
        ranks = sum(name.endswith(".safetensors") for name in files)
        size = sum(size for size, _ in files.values()) / GIB
        age = max(0.0, time.time() - (folder / MANIFEST).stat().st_mtime)
        table.add_row(
            folder.name,
            f"{state['step']:,}",
            f"{state['tokens']:,}",
            f"{state['updates']:,}",
            f"{ranks:,}",
            f"{size:.3f}",
            f"{age / 3600:.1f} h",
        )
    table_console().print(table)
    return 0


def verify(checkpoints: list[Path]) -> int:
    """Hash every file and print a line per checkpoint; return the exit code."""
    is_damaged = False
    for folder in checkpoints:
        try:
            reason = verify_checkpoint(folder)
        except InputError as error:  # of the storage, not of the checkpoint
            reason = str(error)
        is_damaged |= reason is not None
        print(f"{folder.name}: {reason or 'all files match the manifest'}", flush=True)
    return 1 if is_damaged else 0


def diff(left: Path, right: Path) -> int:
    """Print how weights, moments and state of two checkpoints differ; return the exit code."""
    readers = CheckpointReader(left), CheckpointReader(right)
    keys = readers[0].where.keys() | readers[1].where.keys()
    differences = []
    for kind, name in sorted(keys):
        if any((kind, name) not in reader.where for reader in readers):
            differences.append((float("inf"), kind, name, "only in one of them"))
            continue
        a, b = (reader.read_full(kind, name) for reader in readers)
        if a.shape != b.shape:
            text = f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
            differences.append((float("inf"), kind, name, text))
        elif not torch.equal(a.view(torch.int32), b.view(torch.int32)):
            relative = float((a - b).norm() / b.norm().clamp_min(1e-30))
            text = f"{relative:.2e} of its norm, at most {float((a - b).abs().max()):.2e}"
            differences.append((relative, kind, name, text))
    print(
        f"{left} and {right}: {len(keys) - len(differences)} of {len(keys)} tensors are "
        "bit-identical"
    )
    for _, kind, name, text in sorted(differences, reverse=True)[:MAX_ROWS]:
        print(f"  {kind} {name}: {text}")
    if len(differences) > MAX_ROWS:
        print(f"  and {len(differences) - MAX_ROWS} more")
    states = read_state(left), read_state(right)
    state_keys = sorted(states[0].keys() | states[1].keys())
    fields = [key for key in state_keys if states[0].get(key) != states[1].get(key)]
    if fields:
        print(f"  state differs in {', '.join(fields)}")
    return 1 if differences or fields else 0
