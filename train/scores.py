"""Moved: `python train/collect_scores.py`. Removed in version 0.3."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from core.errors import exit_with_new_command

    exit_with_new_command("python train/collect_scores.py")
