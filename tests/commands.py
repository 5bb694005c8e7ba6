"""Run commands of this checkout like a user, and wait for conditions."""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.supervisor import CONTEXT

ROOT = Path(__file__).resolve().parent.parent
# Timeout in seconds of work that takes up to a minute on an idle machine. It is far above what a
# busy machine needs, since no test may depend on load.
TIMEOUT_SECONDS = 1800.0
Result = subprocess.CompletedProcess[str]


def python(*words: object) -> Result:
    """Run a script or `-m module` at the root of the checkout."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )


def forked(*words: object) -> Result:
    """Like `python`, in a fork of a process that has imported torch, DeepSpeed and megatron-core.

    Importing them takes five seconds of processor time.
    """
    command = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=_main, args=(command, Path(folder)))
        process.start()
        process.join(TIMEOUT_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, TIMEOUT_SECONDS)
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return Result(command, process.exitcode, out, err)


def _main(command: list[str], folder: Path) -> None:
    """Run a command line as the Python interpreter does."""
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.flush()
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), stream.fileno())
    os.chdir(ROOT)
    if command[0] == "-m":
        sys.argv[:] = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")


def wait_until(
    condition: Callable[[], object], message: Callable[[], str], pause: float = 0.1
) -> float:
    """Wait until a condition holds; returns the seconds waited. Fails with `message`."""
    started_at = time.monotonic()
    while not condition():
        assert time.monotonic() < started_at + TIMEOUT_SECONDS, message()
        time.sleep(pause)
    return time.monotonic() - started_at
