"""Commands of this checkout as a user types them, and waiting for what they do."""

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
# Seconds until a test calls something hung that takes up to a minute on an idle machine. It is far
# above what a machine under load needs, since no test shall depend on how busy the machine is.
PATIENCE = 1800.0
Result = subprocess.CompletedProcess[str]


def python(*words: object) -> Result:
    """Run a script, or `-m module`, at the root; returns its exit code and what it printed."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def forked(*words: object) -> Result:
    """As `python`, in a fork of a process that has imported torch, DeepSpeed and megatron-core: for
    further cases of commands that import them, which takes five seconds of a processor.
    """
    command = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as home:
        process = CONTEXT.Process(target=_main, args=(command, Path(home)))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, PATIENCE)
        out, err = (Path(home, name).read_text() for name in ("stdout", "stderr"))
    return Result(command, process.exitcode, out, err)


def _main(command: list[str], home: Path) -> None:
    """What Python does with a command line."""
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.flush()
        os.dup2(os.open(home / name, os.O_CREAT | os.O_WRONLY), stream.fileno())
    os.chdir(ROOT)
    if command[0] == "-m":
        sys.argv[:] = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")


def until(condition: Callable[[], object], what: Callable[[], str], pause: float = 0.1) -> float:
    """Wait until a condition holds; returns the seconds it took. `what` explains a failure."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + PATIENCE, what()
        time.sleep(pause)
    return time.monotonic() - begun
