"""List, verify and compare checkpoints.

Exit codes as of diff(1): 0 valid or equal, 1 damaged or different, 2 a mistake in the command.

examples:
  python train/checkpoints.py ls runs/demo
  python train/checkpoints.py verify runs/demo/checkpoints/step-00000321
  python train/checkpoints.py diff runs/demo runs/again    # the newest valid one of each
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from model.find_checkpoint import list_checkpoints
from train.checkpoint.inspection import diff, print_table, resolve_pair, verify


def main(arguments: list[str]) -> int:
    """Run `ls DIR`, `verify DIR` or `diff DIR [OTHER]`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=format_commands("python train/checkpoints.py"),
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
                "other", type=Path, nargs="?", help="its newest valid one if it is a run"
            )
    args = parser.parse_args(arguments)
    try:
        if args.command == "ls":
            return print_table(list_checkpoints(args.folder))
        if args.command == "verify":
            return verify(list_checkpoints(args.folder))
        return diff(*resolve_pair(args.folder, args.other))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
