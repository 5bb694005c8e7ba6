"""Find checkpoints by the path of a run, of its checkpoints folder, or of one of them."""

from collections.abc import Mapping
from pathlib import Path

from core.run import STEP_NAME, RunFiles, iter_checkpoints
from model.checkpoint import newest_valid, verify_checkpoint


def list_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run's folder, a checkpoints folder or a checkpoint, newest first.

    Raises FileNotFoundError when there is none.
    """
    if STEP_NAME.match(path.name) and path.is_dir():
        return [path]
    folder = RunFiles(path).checkpoints if RunFiles(path).checkpoints.is_dir() else path
    checkpoints = list(iter_checkpoints(folder))
    if not checkpoints:
        raise FileNotFoundError(
            f"no checkpoint in {folder}: give a run's folder, its checkpoints, or one of them"
        )
    return checkpoints


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint at a path, or the newest valid one of several.

    Raises ValueError when none verifies.
    """
    checkpoints = list_checkpoints(path)
    best: Path | None
    reasons: Mapping[Path, str | None]
    if checkpoints[0] == path:
        best, reasons = path, {path: verify_checkpoint(path)}
    else:
        best, reasons = newest_valid(checkpoints[0].parent)
    if best is None or reasons.get(best) is not None:
        newest, reason = next(iter(reasons.items()))
        raise ValueError(f"{path} has no checkpoint that verifies: {newest.name}: {reason}")
    return best
