"""Errors that the user can fix, and how a process reports them."""

import os
import shlex
import sys
import time
from contextlib import suppress
from typing import NoReturn

# exit code of a user error; launch/jobs/torchrun.py reads it too
USER_ERROR = 2

# a launcher kills all ranks when one exits: the other ranks give local rank 0 time to print
EXIT_DELAY_SECONDS = 10.0


class InputError(ValueError):
    """A user error; the message names the fix and is printed without a traceback."""


def print_error(message: str) -> bool:
    """Print one line on standard error if this is local rank 0, else return False."""
    rank = os.environ.get("LOCAL_RANK", "")
    if rank.isdecimal() and int(rank) > 0:
        return False
    write_error(message)
    return True


def write_error(message: str) -> None:
    """Print one line on standard error."""
    with suppress(OSError):  # a full disk, or a terminal that was closed
        print(f"error: {message}", file=sys.stderr, flush=True)


def exit_with_error(message: str) -> NoReturn:
    """Exit with USER_ERROR and print the message.

    Local rank 0 of each node prints at once. Another rank prints after a delay: if its error is
    that of all ranks, the launcher ends it before.
    """
    if not print_error(message):
        time.sleep(EXIT_DELAY_SECONDS)
        write_error(message)
    sys.exit(USER_ERROR)


def exit_with_new_command(command: str) -> None:
    """Exit from an entry script that has moved; print its new command with the same arguments."""
    print(f"error: this is now: {shlex.join([*command.split(), *sys.argv[1:]])}", file=sys.stderr)
    sys.exit(USER_ERROR)
