"""torchrun plugin that hides torchrun's traceback when a rank has already printed the reason.

torchrun loads the entry points of group `torchrun.handlers` (pyproject.toml names `quiet`) when it
sets up rendezvous. Two tracebacks are not shown, because the workers have printed the reason on one
line: ChildFailedError if every failed worker exited with a user error or was interrupted, and
SignalException after Ctrl-C or SIGTERM. The exit code is unchanged, and so are all other failures.
"""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from core.entry import shadowing_file
from core.errors import USER_ERROR, exit_with_error
from train.resilience.incidents import INTERRUPTED

REPORTED = (USER_ERROR, INTERRUPTED)  # exit codes whose reason a worker has printed


def refuse_shadowed(argv: list[str]) -> None:
    """Exit with an error if a file in the working folder shadows the command of `torchrun -m`."""
    package = argv[argv.index("-m") + 1].split(".")[0] if "-m" in argv[:-1] else ""
    if package in ("data", "eval", "launch", "train") and (file := shadowing_file(package)):
        exit_with_error(
            f"{file} shadows our package {package}: rename it, or PYTHONSAFEPATH=1 torchrun ..."
        )


def quiet() -> Callable[..., Any]:
    """Install the exception hook and refuse a shadowed command.

    torchrun expects a rendezvous handler in return; this one always raises.
    """
    refuse_shadowed(sys.argv)
    default_hook = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if kind.__name__ == "SignalException":
            return  # the workers got the signal too, saved, and printed where the run continues
        failures = getattr(error, "failures", {}).values()
        reported = [failure for failure in failures if failure.exitcode in REPORTED]
        # torchrun kills the other workers after the first failure
        killed = [failure for failure in failures if failure.exitcode < 0]
        is_explained = reported and len(reported) + len(killed) >= len(failures)
        if kind.__name__ != "ChildFailedError" or not is_explained:
            default_hook(kind, error, trace)

    sys.excepthook = hook

    def no_backend(parameters: Any) -> Any:
        raise ValueError("this is not a rendezvous backend: use --rdzv-backend c10d")

    return no_backend
