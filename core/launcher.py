"""What a launcher says: its variables, checked before anything reads them, and its signals."""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from core.errors import InputError

COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
RANKS = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}
OTHER_NUMBERS = ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by a rank, to find the others


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Raise InputError where a launcher's variables are no numbers, or contradict each other."""
    values = {}
    for name in (*COUNTS, *RANKS, *OTHER_NUMBERS):
        text = environment.get(name)
        if text is None:
            continue
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise InputError(f"{name} is {text!r} in the environment: set a number, or unset it")
        values[name] = int(text)
    for name in COUNTS:
        if values.get(name) == 0:
            raise InputError(f"{name} is 0 in the environment: set the number of ranks")
    for name, count in RANKS.items():
        if values.get(name, 0) >= values.get(count, sys.maxsize):
            raise InputError(
                f"{name} is {values[name]} in the environment, {count} is {values[count]}: ranks "
                "count from 0; start the ranks with torchrun, or unset both"
            )
    if not 0 < values.get("MASTER_PORT", 1) < 2**16:
        raise InputError(
            f"MASTER_PORT is {values['MASTER_PORT']} in the environment: set a port of 1 to 65535"
        )
    missing = [name for name in NEEDED if not environment.get(name)]
    if "RANK" in values and missing:
        raise InputError(
            f"RANK is set in the environment, {' and '.join(missing)} not: start the ranks with "
            "torchrun, or unset it"
        )
    if values.get("WORLD_SIZE", 1) > 1 and "RANK" not in values:
        raise InputError(
            f"WORLD_SIZE is {values['WORLD_SIZE']} in the environment, RANK is not set: start the "
            "ranks with torchrun, or unset it"
        )


def check_gpus(count: int) -> None:
    """Raise InputError, on all ranks of a node alike, where it has more ranks than `count` GPUs."""
    last = int(os.environ.get("LOCAL_RANK", "0"))
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), last + 1)
    if ranks > count:
        raise InputError(
            f"this node has {ranks} ranks and {count} GPU{'s' * (count > 1)}, one for a rank: "
            f"start with --nproc-per-node {count} (make demo: RANKS={count}; submit: "
            f"cluster.ranks_per_node={count}), or on CPUs with cluster.device=cpu"
        )


def launcher_pid() -> int | None:
    """The parent of a rank, which restarts and stops it; None if the parent is no launcher.

    Without a launcher it is a shell, whose end at a logout `nohup python ...` is meant to survive.
    """
    return os.getppid() if "RANK" in os.environ else None


def check_text(arguments: list[str]) -> None:
    """Raise InputError if the arguments or the working folder are not text."""
    for word in (*arguments, os.getcwd()):
        try:
            word.encode()
        except UnicodeEncodeError as error:  # bytes that Python could not decode
            raise InputError(
                f"{word.encode(errors='backslashreplace').decode()} is not UTF-8: write it in "
                "UTF-8, or rename the folder"
            ) from error


def handled_signals() -> list[signal.Signals]:
    """The signals that ask to stop: SIGHUP only if nohup does not have this process ignore it.

    SIGINT and SIGQUIT always, since scripts ignore them in whatever they start with `&`.
    """
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if not (ignores_hangup and number == signal.SIGHUP)]


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Call `handler` at each of handled_signals(); returns the handlers before."""
    return {number: signal.signal(number, handler) for number in handled_signals()}
