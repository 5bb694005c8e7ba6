"""A few processes that share the work of a preparation, with a line on the terminal at least every
ten seconds.
"""

import ctypes
import fcntl
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import InputError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

Job = tuple[Any, ...]  # function and its arguments


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a data folder: two preparations would write the same files. Raises InputError when it is
    held.

    The lock belongs to this process and not to its children, and ends with it however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another preparation works in {folder}: wait for it, or choose data.folder"
            ) from error
        yield


def die_with_parent() -> None:
    """Let the kernel end this process with its parent, so that no orphan writes into the next run's
    files.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_worker(logs: str) -> None:
    """Send all that datatrove and its libraries print to a file, and bind the lives of children to
    ours.
    """
    die_with_parent()
    # the extractor's sandbox is forked from here
    os.register_at_fork(after_in_child=die_with_parent)
    log = open(Path(logs) / f"worker-{os.getpid()}.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log


class Workers:
    """Forked processes: what the parent has imported, which takes seconds, they need not import
    again.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder
        self.count = count
        self.started = time.monotonic()
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(
            count, context, initializer=start_worker, initargs=(str(logs),)
        )

    def describe(self) -> str:
        """Where it runs."""
        return f"{self.count} workers"

    def run(
        self, stage: str, jobs: dict[str, list[Job]], finished: Callable[[str, list[Any]], None]
    ) -> None:
        """Run the jobs of all names together; `finished(name, results)` is called here when a
        name's are all done.

        The first error stops the rest and is raised as it was.
        """
        futures = {name: [self.pool.submit(*job) for job in jobs[name]] for name in jobs}
        pending: set[Future[Any]] = {future for group in futures.values() for future in group}
        unfinished = list(futures)
        spoke = time.monotonic()
        while unfinished:
            done, pending = wait(
                pending, max(0.0, spoke + HEARTBEAT_SECONDS - time.monotonic()), FIRST_COMPLETED
            )
            for future in done:
                self.raise_error(future, pending)
            for name in [
                name for name in unfinished if all(future.done() for future in futures[name])
            ]:
                finished(name, [future.result() for future in futures[name]])
                unfinished.remove(name)
                spoke = time.monotonic()
            if time.monotonic() >= spoke + HEARTBEAT_SECONDS:
                tasks = {
                    name: (sum(f.done() for f in futures[name]), len(futures[name]))
                    for name in unfinished
                }
                say(stage, tasks, self.folder / "building", time.monotonic() - self.started)
                spoke = time.monotonic()

    def raise_error(self, future: "Future[Any]", pending: "set[Future[Any]]") -> None:
        """Raise the error of a finished job, if any, after cancelling what has not begun."""
        error = future.exception()
        if error is not None:
            for other in pending:
                other.cancel()
            error.add_note(f"the workers' logs are in {self.folder / 'logs'}")
            raise error

    def close(self) -> None:
        """End the processes; jobs that have not begun are dropped."""
        self.pool.shutdown(cancel_futures=True)


def say(
    stage: str, tasks: dict[str, tuple[int, int]], building: Path | None, seconds: float
) -> None:
    """One line: tasks done of all per name, and bytes on disk so far as a sign of life."""
    done = ", ".join(f"{name} {some}/{all_}" for name, (some, all_) in tasks.items())
    files = (Path(root) / name for root, _, names in os.walk(building or "") for name in names)
    written = (
        f"; {sum(file.stat().st_size for file in files if file.exists()) / 1e6:.1f} MB"
        if building
        else ""
    )
    logger.info(f"  {stage}: {done} tasks{written}; {seconds:.0f} s")
