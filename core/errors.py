"""What a user can mend, and how a process says so."""

import shlex
import sys

# exit code of a mistake that the user can mend; launch's torchrun handler knows it too
USER_ERROR = 2


class InputError(ValueError):
    """A mistake the user can mend; the message names the fix and is printed without a traceback."""


def moved(command: str) -> None:
    """End an entry script that has moved with one line: its new command, and the arguments it was
    given.
    """
    print(f"error: this is now: {shlex.join([*command.split(), *sys.argv[1:]])}", file=sys.stderr)
    sys.exit(USER_ERROR)
