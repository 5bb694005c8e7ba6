"""What lies in a folder of checkpoints, for eyes: list, verify and compare them.

Exit codes are those of diff(1): 0 all well or equal, 1 damaged or different, 2 a mistake in the
question.

examples:
  python train/checkpoints.py ls runs/demo
  python train/checkpoints.py verify runs/demo/checkpoints/step-00000321
  python train/checkpoints.py diff runs/demo runs/again    # the newest valid one of each
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import as_called, explain_missing_extras

explain_missing_extras()

from train.checkpoint.inspection import checkpoints, diff, pair, show, verify


def main(arguments: list[str]) -> int:
    """`ls DIR`, `verify DIR` or `diff DIR [OTHER]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=as_called("python train/checkpoints.py"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("ls", "steps, tokens, sizes and ages; nothing is hashed"),
        ("verify", "read and hash every file of every checkpoint"),
        ("diff", "compare weights and moments of two checkpoints, or of the newest two"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "folder", type=Path, help="a run, its checkpoints folder, or one checkpoint"
        )
        if name == "diff":
            command.add_argument(
                "other", type=Path, nargs="?", help="the newest valid one where it is a run"
            )
    given = parser.parse_args(arguments)
    try:
        if given.command == "ls":
            return show(checkpoints(given.folder))
        if given.command == "verify":
            return verify(checkpoints(given.folder))
        return diff(*pair(given.folder, given.other))
    except (FileNotFoundError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
