"""Keeps torchrun from burying a one-line error under its own traceback.

torchrun loads the entry points of group `torchrun.handlers` (pyproject.toml names this one) when it
sets up rendezvous. When every failed worker ended with the exit code of a user's mistake, or of a
run that saved and wants to be started again, the line it printed says all there is to say, and
torchrun's ChildFailedError is not shown. Its exit code stays; every other failure is reported as
ever.
"""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from core.entry import shadowing_file
from core.errors import USER_ERROR, exit_with_error
from train.resilience.incidents import REQUEUE

SAID = (USER_ERROR, REQUEUE)  # exit codes whose reason a worker has printed


def refuse_hidden(words: list[str]) -> None:
    """End in one line if a file in the working folder hides the command of `torchrun -m`."""
    package = words[words.index("-m") + 1].split(".")[0] if "-m" in words[:-1] else ""
    if package in ("data", "eval", "launch", "train") and (file := shadowing_file(package)):
        exit_with_error(
            f"{file} shadows our package {package}: rename it, or PYTHONSAFEPATH=1 torchrun ..."
        )


def quiet() -> Callable[..., Any]:
    """Install the hook; what torchrun asked for, a rendezvous handler, is a refusal: none is
    offered here. Ends torchrun where `-m` would start a file of the user's in place of ours.
    """
    refuse_hidden(sys.argv)
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failures = getattr(error, "failures", {})
        spoken = [failure for failure in failures.values() if failure.exitcode in SAID]
        # by torchrun, after the first
        ended = [failure for failure in failures.values() if failure.exitcode < 0]
        if (
            kind.__name__ != "ChildFailedError"
            or not spoken
            or len(spoken) + len(ended) < len(failures)
        ):
            shown(kind, error, trace)

    sys.excepthook = hook

    def refuse(parameters: Any) -> Any:
        raise ValueError("this is no rendezvous backend: use --rdzv-backend c10d")

    return refuse
