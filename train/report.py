"""Draw curves.png of runs, and one HTML page of all of them that needs no network."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from core import log
from core.run import RunFiles
from train.metrics.curves import draw
from train.metrics.page import page

EXAMPLES = """examples:
  python train/report.py runs/demo
  python train/report.py runs/sweeps/norms/* --output runs/sweeps/norms/runs.html
"""


def main() -> None:
    """Run the command."""
    log.init_logger()
    parser = argparse.ArgumentParser(
        prog=format_commands("python train/report.py"),
        description=__doc__,
        epilog=format_commands(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold metrics.jsonl")
    parser.add_argument(
        "--output",
        type=Path,
        help="file of the page; default: report.html in the first run's folder",
    )
    args = parser.parse_args()
    folders = [folder for folder in args.runs if RunFiles(folder).metrics.is_file()]
    if not folders:
        parser.error(
            f"no metrics.jsonl in {', '.join(map(str, args.runs))}: give folders of started runs"
        )
    for folder in folders:
        print(draw(folder))
    print(page(folders, args.output or RunFiles(folders[0]).report))


if __name__ == "__main__":
    main()
