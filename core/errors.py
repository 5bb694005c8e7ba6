"""What a user can mend, and how a process says so."""

import os
import shlex
import sys
import time
from typing import NoReturn

# exit code of a mistake that the user can mend; launch's torchrun handler knows it too
USER_ERROR = 2

# a launcher ends all ranks when one exits: the others let the first of their machine speak
EXIT_DELAY_SECONDS = 10.0


class InputError(ValueError):
    """A mistake the user can mend; the message names the fix and is printed without a traceback."""


def exit_with_error(message: str) -> NoReturn:
    """Exit with the code of a user's mistake; the first rank of each machine prints the reason."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(EXIT_DELAY_SECONDS)
    sys.exit(USER_ERROR)


def exit_with_new_command(command: str) -> None:
    """End an entry script that has moved; print its new command with the given arguments."""
    print(f"error: this is now: {shlex.join([*command.split(), *sys.argv[1:]])}", file=sys.stderr)
    sys.exit(USER_ERROR)
