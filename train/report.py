"""Runs in pictures: curves.png of each, and one page of all, which needs no network."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import as_called, explain_missing_extras

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
    """The command line."""
    log.set_up()
    parser = argparse.ArgumentParser(
        prog=as_called("python train/report.py"),
        description=__doc__,
        epilog=as_called(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold metrics.jsonl")
    parser.add_argument(
        "--output", type=Path, help="of the page; report.html in the first run's folder otherwise"
    )
    given = parser.parse_args()
    folders = [folder for folder in given.runs if RunFiles(folder).metrics.is_file()]
    if not folders:
        parser.error(
            f"no metrics.jsonl in {', '.join(map(str, given.runs))}; name folders of runs that "
            "have begun"
        )
    for folder in folders:
        print(draw(folder))
    print(page(folders, given.output or RunFiles(folders[0]).report))


if __name__ == "__main__":
    main()
