"""Worker processes of a data folder: one preparation at a time, and no orphaned processes."""

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import InputError
from core.files import make_folder

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a data folder, since two preparations would write the same files.

    The lock belongs to this process, not to its children; the kernel releases it when the process
    ends. Raises InputError if the folder is locked.
    """
    make_folder(folder)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another preparation is running in {folder}: wait for it, or set data.folder"
            ) from error
        yield


def die_with_parent() -> None:
    """Have the kernel kill this process with its parent: orphans would write into the next run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def init_worker(logs: str) -> None:
    """Redirect the output of a worker's libraries to a file; children die with the worker."""
    die_with_parent()
    # the extractor's sandbox is forked from here
    os.register_at_fork(after_in_child=die_with_parent)
    log = open(Path(logs) / f"worker-{os.getpid()}.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
