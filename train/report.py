"""Draw curves.png of runs, and one HTML page of all of them that needs no network."""

import argparse
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from core import log
from core.run import RunFiles
from train.metrics.curves import draw
from train.metrics.page import page
from train.resilience.incidents import is_running

WATCH_SECONDS = 30

EXAMPLES = """examples:
  python train/report.py runs/demo
  python train/report.py runs/demo --watch
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
    parser.add_argument(
        "--watch",
        nargs="?",
        type=int,
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"draw again every SECONDS ({WATCH_SECONDS}) until no run is running; the page "
        "reloads itself in a browser",
    )
    args = parser.parse_args()
    if args.watch is not None and args.watch < 1:
        parser.error("--watch takes whole seconds, 1 or more")
    folders = [folder for folder in args.runs if RunFiles(folder).metrics.is_file()]
    if not folders:
        parser.error(
            f"no metrics.jsonl in {', '.join(map(str, args.runs))}: give folders of started runs"
        )
    output = args.output or RunFiles(folders[0]).report
    refresh = args.watch if any(map(is_running, folders)) else None
    if refresh is not None:
        print(f"{page(folders, output, refresh)} is drawn every {refresh} s while a run is running")
    while refresh is not None:
        time.sleep(refresh)
        refresh = args.watch if any(map(is_running, folders)) else None
        page(folders, output, refresh)
    for folder in folders:
        print(draw(folder))
    print(page(folders, output))


if __name__ == "__main__":
    main()
