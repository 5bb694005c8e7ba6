"""torchrun plugin: signals, time to save, and exit codes of training; no needless tracebacks.

torchrun loads the entry points of group `torchrun.handlers` (pyproject.toml names `quiet`) before
it reads its options.

Training gets defaults of three options. Which signals torchrun passes to its ranks and how long it
waits for them, since its own would lose a run's last save; and the address of a machine whose name
does not resolve.

Two tracebacks are not shown, because the workers have printed the reason on one line:
ChildFailedError if every failed worker exited with a user error or was interrupted, and
SignalException after a signal. torchrun then exits with the workers' code in place of 1, so that
a launcher knows how the run ended even if outcome.json could not be written. All other failures are
unchanged.
"""

import os
import socket
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from core.entry import shadowing_file
from core.errors import USER_ERROR, exit_with_error
from core.launcher import handled_signals
from train.resilience.incidents import INTERRUPTED

REPORTED = (USER_ERROR, INTERRUPTED)  # exit codes whose reason a worker has printed
# Until torchrun kills ranks that save after a signal (its own: 30 s). The watchdog ends a rank that
# hangs long before.
SHUTDOWN_SECONDS = 3600


def refuse_shadowed(argv: list[str]) -> None:
    """Exit with an error if a file in the working folder shadows the command of `torchrun -m`."""
    package = argv[argv.index("-m") + 1].split(".")[0] if "-m" in argv[:-1] else ""
    if package in ("data", "eval", "launch", "train") and (file := shadowing_file(package)):
        exit_with_error(
            f"{file} shadows our package {package}: rename it, or PYTHONSAFEPATH=1 torchrun ..."
        )


def set_defaults_for_training(argv: list[str]) -> None:
    """Set torchrun's defaults for train/pretrain.py; options and variables of the user's win."""
    if not any(word == "train.pretrain" or word.endswith("train/pretrain.py") for word in argv):
        return
    names = [number.name for number in handled_signals()]
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(names))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    is_alone = not any(word.startswith(("--nnodes", "--rdzv")) for word in argv)
    if is_alone and not is_resolved(socket.getfqdn()):  # torchrun would wait for half an hour
        os.environ.setdefault("PET_LOCAL_ADDR", "localhost")


def is_resolved(name: str) -> bool:
    """Whether a machine's name has an address here."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def quiet() -> Callable[..., Any]:
    """Install the exception hook, set torchrun's defaults and refuse a shadowed command.

    torchrun expects a rendezvous handler in return; this one always raises.
    """
    refuse_shadowed(sys.argv)
    set_defaults_for_training(sys.argv)
    default_hook = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if kind.__name__ == "SignalException":
            # the workers got the signal too, saved, and printed where the run continues
            sys.exit(INTERRUPTED)
        failures = getattr(error, "failures", {}).values()
        reported = [failure for failure in failures if failure.exitcode in REPORTED]
        # torchrun kills the other workers after the first failure
        killed = [failure for failure in failures if failure.exitcode < 0]
        is_explained = reported and len(reported) + len(killed) >= len(failures)
        if kind.__name__ == "ChildFailedError" and is_explained:
            sys.exit(min(failure.exitcode for failure in reported))  # a user error wins
        default_hook(kind, error, trace)

    sys.excepthook = hook

    def no_backend(parameters: Any) -> Any:
        raise ValueError("this is not a rendezvous backend: use --rdzv-backend c10d")

    return no_backend
