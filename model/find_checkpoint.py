"""Find checkpoints by the path of a run, of its checkpoints folder, or of one of them."""

from pathlib import Path

from core.run import STEP_NAME, RunFiles, iter_checkpoints
from model.checkpoint import newest_valid


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
    best, reasons = newest_valid(list_checkpoints(path))
    if best is None:
        newest, reason = next(iter(reasons.items()))
        raise ValueError(f"{path} has no checkpoint that verifies: {newest.name}: {reason}")
    return best
