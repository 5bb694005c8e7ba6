"""What a user can mend, and how a process says so."""

USER_ERROR = 2  # exit code of a mistake that the user can mend; launch's torchrun handler knows it too


class InputError(ValueError):
    """A mistake the user can mend; the message names the fix and is printed without a traceback."""
