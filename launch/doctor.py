"""Check whether this machine can execute the run, with a fix for each problem.

Without an experiment, check what needs no run: packages, GPUs, kernels, the network between ranks,
compiler, memory and disk.

examples:
  python launch/doctor.py
  python launch/doctor.py +experiment=demo
  srun -N 1 --gpus-per-node=8 python launch/doctor.py +experiment=7b
"""

import os
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.command import command
from core.console import table_console
from core.errors import USER_ERROR
from launch.planning.checks import HOST_CHECKS, MACHINE_CHECKS, Finding, usable_ranks
from launch.planning.run_checks import RUN_CHECKS
from train.config import RunConfig

MACHINE = "this-machine"  # name in place of a run's
NAMED_RUN = re.compile(r"\+{0,2}(experiment|run\.name)=")
COLORS = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass
class CheckResult:
    """A check's name and finding."""

    name: str
    finding: Finding


def run_checks(config: RunConfig, console: Console | None = None) -> list[CheckResult]:
    """Run all checks and show the current one; a check that raises becomes a bad finding."""
    results = []
    checks = MACHINE_CHECKS | (HOST_CHECKS if config.run.name == MACHINE else RUN_CHECKS)
    for name, check in checks.items():
        try:
            with console.status(name) if console else nullcontext():
                finding = check(config)
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            fix = "see the message; python -X faulthandler launch/doctor.py shows more"
            finding = Finding("bad", message, fix)
        results.append(CheckResult(name, finding))
    return results


@command(RunConfig)
def main(config: RunConfig) -> None:
    """Print one line per check, then the fixes; exit with code 2 if any finding is bad."""
    if config.run.name == MACHINE:
        config.cluster.ranks_per_node = usable_ranks()
    console = table_console()
    results = run_checks(config, console)
    table = Table(title=f"{config.run.name}, {os.uname().nodename}")
    for column in ("check", "state", "finding"):
        table.add_column(column, overflow="fold")
    for result in results:
        finding = result.finding
        table.add_row(result.name, Text(finding.state, COLORS[finding.state]), finding.text)
    console.print(table)
    for result in results:
        finding = result.finding
        if finding.state != "ok" and finding.fix:
            console.print(
                f"{result.name}: {finding.fix}", markup=False, style=COLORS[finding.state]
            )
    if any(result.finding.state == "bad" for result in results):
        sys.exit(USER_ERROR)


def check_machine_or_run() -> None:
    """Check the run of the command line, or where it names none the machine."""
    if not any(map(NAMED_RUN.match, sys.argv[1:])):
        sys.argv.append(f"run.name={MACHINE}")
    main()


if __name__ == "__main__":
    check_machine_or_run()
