"""The record of a run: config.yaml with every setting and one entry per start.

The entry of a start has its time, position, code, versions, number of ranks, where its weights came
from, and which settings differ from those of its checkpoint: decisive ones, which change the
mathematics, and operational ones. A finished run's record stays as it is.
"""

import subprocess
import sys
import time
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from core.files import ROOT, write_text
from core.old_keys import read_record
from core.schema import covers
from train.checkpoint.manager import TrainState
from train.record.changes import DECISIVE, Change, find_changes
from train.record.origin import Origin

# packages that decide numbers, or the order of data
PACKAGES = (
    *("torch", "triton", "deepspeed", "megatron-core", "mamba-ssm", "causal-conv1d"),
    *("numpy", "safetensors"),
)


def write_record(
    path: Path,
    record: dict[str, Any],
    state: TrainState,
    origin: Origin | None,
    initial: str | None,
    ranks: int,
) -> None:
    """Write config.yaml: the settings of this start, and the history with this start's entry."""
    previous = read_record(path)
    if origin is not None:
        changes = origin.changes
    else:  # a start before the first checkpoint, or again after it
        changes = find_changes(previous, record) if previous else []
    entry: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "tokens": state.tokens,
        "step": state.step,
        "ranks": ranks,
        "code": record["code"],
        "versions": versions(),
    }
    if origin is not None and origin.is_branch:
        entry["branch_of"] = str(origin.checkpoint)
    if origin is None and initial is not None:
        entry["initial_weights"] = initial
    for kind, is_decisive in (("decisive", True), ("operational", False)):
        some = [change for change in changes if covers(DECISIVE, change.key) == is_decisive]
        if some:
            entry[kind] = as_table(some)
    history = [*(previous.get("history") or []), entry]
    content = {**record, "history": history}
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(content)))


def as_table(changes: list[Change]) -> dict[str, list[Any]]:
    """Old and new value by key."""
    return {change.key: [change.before, change.now] for change in changes}


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages of PACKAGES."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_version() -> dict[str, Any]:
    """Commit of the code and whether files have changed; empty without git or a repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    try:
        if git("rev-parse", "--show-prefix") != "":  # installed inside another repository
            return {}
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {}


def to_plain(value: Any) -> Any:
    """Convert a config to JSON-like values."""
    if isinstance(value, dict):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [to_plain(entry) for entry in value]
    return value.value if isinstance(value, Enum) else value
