"""Log the scores of finished evaluation jobs to a run's metrics.jsonl, W&B and TensorBoard.

Every evaluation job ends with this command. A run logs scores itself while it trains, but those of
its last checkpoint come after it has ended.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from core import log
from train.metrics.scores import collect

logger = logging.getLogger(__name__)
EXAMPLES = """examples:
  python train/collect_scores.py runs/7b
"""


def main() -> None:
    """Run the command."""
    log.init_logger()
    parser = argparse.ArgumentParser(
        prog=format_commands("python train/collect_scores.py"),
        description=__doc__,
        epilog=format_commands(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a run's folder")
    if not collect(parser.parse_args().folder):
        logger.info("no new scores")


if __name__ == "__main__":
    main()
