"""Take in the scores of evaluation jobs: `python train/collect_scores.py RUN_FOLDER`, with which
every job ends.

A run takes them itself while it lives, but those of its last checkpoint come when it is gone. They
go where the run would have put them: metrics.jsonl, W&B, TensorBoard.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import as_called, explain_missing_extras

explain_missing_extras()

from core import log
from core.errors import InputError
from train.metrics.scores import collect

logger = logging.getLogger(__name__)
EXAMPLES = """examples:
  python train/collect_scores.py runs/7b
"""


def main() -> None:
    """The command line."""
    log.set_up()
    parser = argparse.ArgumentParser(
        prog=as_called("python train/collect_scores.py"),
        description=__doc__,
        epilog=as_called(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of a run")
    try:
        if not collect(parser.parse_args().folder):
            logger.info("no scores that its records do not have")
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
