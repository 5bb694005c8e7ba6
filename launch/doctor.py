"""Is this machine fit for the run? Looks at everything that it needs, and names a fix for each
fault.

examples:
  python launch/doctor.py +experiment=demo
  srun -N 1 --gpus-per-node=8 python launch/doctor.py +experiment=7b
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from rich.console import Console
from rich.table import Table

from core.command import command
from core.errors import USER_ERROR
from launch.planning.checks import CHECKS, Finding
from train.config import RunConfig

COLOURS = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass
class Line:
    """One check with what it found."""

    name: str
    finding: Finding


def examine(config: RunConfig, console: Console | None = None) -> list[Line]:
    """Run every check in turn and show its name; a check that raises is a finding too."""
    lines = []
    for name, check in CHECKS.items():
        try:
            with console.status(name) if console else nullcontext():
                finding = check(config)
        except (
            Exception
        ) as error:  # a doctor that falls ill helps nobody: the patient gets the message
            fix = "see the message; python -X faulthandler launch/doctor.py tells more"
            finding = Finding("bad", f"{type(error).__name__}: {' '.join(str(error).split())}", fix)
        lines.append(Line(name, finding))
    return lines


@command(RunConfig)
def main(config: RunConfig) -> None:
    """Print a line per check, and a fix below every red one; exit code 2 when there is any."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    lines = examine(config, console)
    table = Table(title=f"{config.run.name} on {os.uname().nodename}")
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for line in lines:
        finding = line.finding
        table.add_row(line.name, f"[{COLOURS[finding.state]}]{finding.state}[/]", finding.text)
    console.print(table)
    bad = [line for line in lines if line.finding.state != "ok" and line.finding.fix]
    for line in bad:
        console.print(
            f"{line.name}: {line.finding.fix}", markup=False, style=COLOURS[line.finding.state]
        )
    if any(line.finding.state == "bad" for line in lines):
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
