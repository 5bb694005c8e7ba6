"""Find checkpoints by the path of a run, of its checkpoints folder, or of one of them."""

from pathlib import Path

from core.run import RunFiles, iter_checkpoints
from model.checkpoint import newest_valid
from train.checkpoint.manager import invalid_reason


def list_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run's folder, a checkpoints folder or a checkpoint, newest first.

    Raises FileNotFoundError when there is none.
    """
    if path.name.startswith("step-") and path.is_dir():
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
    best = path if checkpoints[0] == path else newest_valid(checkpoints[0].parent)[0]
    if best is None or invalid_reason(best) is not None:
        raise ValueError(f"{path} has no checkpoint that verifies")
    return best
