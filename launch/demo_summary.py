"""Print what a finished demo has learnt, what the figures mean, and the next commands."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from core.errors import InputError
from core.run import RunFiles
from train.metrics.page import read_evaluation
from train.metrics.records import is_step, read_lines

TEXT = """
The demo has finished after {minutes:.1f} minutes; everything is in {folder}.
  training loss   {first_loss:.2f} at step {first_step:,}, {last_loss:.2f} at step {last_step:,} \
(nats per token)
  held-out text   {bits:.2f} bits per byte; {unigram:.2f} by the unigram model
The unigram model knows only how frequent each token is. The trained one needs {fewer:.0%} fewer
bits for text that it has never seen: so much it has learnt about which token follows which.

Next:
{next_commands}
"""
NEXT = (
    ("python train/report.py {folder}", "curves and tables on one page"),
    ('python eval/generate.py checkpoint={folder} prompt="import os"', "let it write"),
    ("python data/prepare.py +experiment=own data.input=FOLDER", "train on your own text"),
)
EXAMPLES = """examples:
  python launch/demo_summary.py runs/demo 200
"""


def summary(folder: Path, seconds: float) -> str:
    """The summary of a run that took `seconds` in all; it must have been evaluated."""
    steps = [
        record
        for record in read_lines(RunFiles(folder).metrics)
        if is_step(record) and record["loss"] is not None
    ]
    evaluation = read_evaluation(folder)
    if not steps or evaluation is None:
        raise InputError(f"{folder} has no evaluated steps: run `make demo`")
    scores = evaluation["heldout"]["all"]
    bits, unigram = scores["bits_per_byte"], scores["unigram_bits_per_byte"]
    commands = [(command.format(folder=folder), purpose) for command, purpose in NEXT]
    width = max(len(command) for command, _ in commands)
    return TEXT.format(
        minutes=seconds / 60,
        folder=folder,
        first_loss=steps[0]["loss"],
        first_step=steps[0]["step"],
        last_loss=steps[-1]["loss"],
        last_step=steps[-1]["step"],
        bits=bits,
        unigram=unigram,
        fewer=1 - bits / unigram,
        next_commands="\n".join(f"  {command:{width}}  # {why}" for command, why in commands),
    )


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(
        prog=format_commands("python launch/demo_summary.py"),
        description=__doc__,
        epilog=format_commands(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("seconds", type=float, help="what all its commands took")
    options = parser.parse_args()
    print(summary(options.folder, options.seconds))


if __name__ == "__main__":
    main()
