"""What a batch script asks before and after every start of a run.

`begin` notes the start in attempts.jsonl and strikes nodes that Slurm lost under the start before.
`end` prints what to do: `done`, `requeue` or `stop`, then the reason, for the batch script and its
log. How a run ended stands in its outcome.json, since srun and torchrun turn exit codes into
others; without one it crashed.

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
from launch.slurm.attempts import begin, end, excluded


def ask(*command: str) -> list[str]:
    """Words that a Slurm command prints; none where it fails, for a start must not hang on it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def main() -> None:
    """The command line."""
    log.init_logger()
    parser = argparse.ArgumentParser(
        prog="python launch/attempt.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "event", choices=("begin", "end", "excluded"), help="excluded lists the nodes to avoid"
    )
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--code", type=int, default=0, help="exit code of the step that ended")
    parser.add_argument(
        "--crashes", type=int, default=3, help="in a row without a new checkpoint, then it stops"
    )
    parser.add_argument(
        "--strikes", type=int, default=2, help="lines of a node after which it is avoided"
    )
    parser.add_argument(
        "--bad-nodes", type=Path, required=True, help="file with a line per crash or loss"
    )
    given = parser.parse_args()
    if given.event == "begin":
        nodes = ask("scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", ""))
        begin(
            given.folder,
            nodes,
            ask("sinfo", "-hN", "-t", "down,fail,no_respond", "-o", "%N"),
            given.bad_nodes,
        )
    elif given.event == "end":
        print(*end(given.folder, given.code, given.crashes, given.bad_nodes))
    else:
        print(",".join(excluded(given.bad_nodes, given.strikes)))


if __name__ == "__main__":
    main()
