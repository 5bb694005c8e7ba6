"""Record the start and end of a run's attempt; called by the batch script of training.

`begin` records the start in attempts.jsonl, and a strike against each node that went down during
the previous start. `end` prints `done`, `requeue` or `stop` and the reason, which the batch script
acts on. `excluded` prints the nodes to avoid. Exit codes are not used, since srun and torchrun
change them: outcome.json in the run's folder tells how a run ended, and its absence means a crash.

examples:
  python launch/attempt.py begin runs/7b --bad-nodes runs/bad_nodes.txt
  python launch/attempt.py end runs/7b --code 1 --bad-nodes runs/bad_nodes.txt
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from core import log
from core.errors import InputError, exit_with_error
from core.launcher import check_launcher
from core.ranges import Range
from launch.slurm.attempts import excluded_nodes, record_end, record_start


def slurm_words(*command: str) -> list[str]:
    """Words of a Slurm command's output; empty if it fails, so that a start never fails with it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def main() -> None:
    log.init_logger()
    parser = argparse.ArgumentParser(
        prog="python launch/attempt.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("event", choices=("begin", "end", "excluded"))
    parser.add_argument("folder", type=Path, help="folder of the run")
    parser.add_argument("--code", type=int, default=0, help="exit code of the job step (end)")
    parser.add_argument(
        "--crashes",
        type=Range(1).parse,
        default=3,
        help="crashes in a row without a new checkpoint after which the job stops (end)",
    )
    parser.add_argument(
        "--strikes",
        type=Range(1).parse,
        default=2,
        help="strikes after which a node is avoided (excluded)",
    )
    parser.add_argument(
        "--bad-nodes", type=Path, required=True, help="file with one line per strike"
    )
    try:
        check_launcher()
        run_event(parser.parse_args())
    except (InputError, OSError) as error:  # the batch script stops if `end` prints nothing
        exit_with_error(f"{error}; the start's record is incomplete")


def run_event(args: argparse.Namespace) -> None:
    """Record the event, or print what the batch script asks for. Raises InputError, OSError."""
    if args.event == "begin":
        nodelist = os.environ.get("SLURM_JOB_NODELIST", "")
        nodes = slurm_words("scontrol", "show", "hostnames", nodelist)
        down_nodes = slurm_words("sinfo", "-hN", "-t", "down,fail,no_respond", "-o", "%N")
        record_start(args.folder, nodes, down_nodes, args.bad_nodes)
    elif args.event == "end":
        print(*record_end(args.folder, args.code, args.crashes, args.bad_nodes))
    else:
        print(",".join(excluded_nodes(args.bad_nodes, args.strikes)))


if __name__ == "__main__":
    main()
