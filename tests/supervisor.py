"""A launcher for tests: starts ranks as real processes, and restarts them as torchrun and a
requeued job would.

The ranks are forks of one process that has imported everything, so a restart costs a fraction of a
second and faults by the dozen are affordable. What they run is train/run_context.py's start, with
the command line's exit codes.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil

from core import log
from train.config import RunConfig
from train.metrics.records import read_lines
from train.resilience.incidents import read_outcome

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])
GRACE_SECONDS = 60.0  # between SIGTERM and SIGKILL for peers of a rank that failed
CANARY = "canary-5e1f-not-for-any-file"
# of every rank; nobody answers at this address
SECRETS = {
    "WANDB_API_KEY": CANARY,
    "FALCON_TEST_SECRET": CANARY,
    "WANDB_BASE_URL": "http://127.0.0.1:9",
}


@dataclass
class History:
    """What the launcher saw: exit codes of all ranks by start, none where it was interrupted; and
    the time.
    """

    codes: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def starts(self) -> int:
        """How often the ranks were started."""
        return len(self.codes)


def supervise(
    run: RunConfig, world: int, faults: list[Any], home: Path, limit: int = 200
) -> History:
    """Start, and start again, until outcome.json says that the run is finished or stopped; logs lie
    in `home`.

    Interrupted by Ctrl-C, the ranks save and leave, and another call with the same arguments goes
    on.
    """
    home.mkdir(parents=True, exist_ok=True)
    record = home / "starts.jsonl"
    while len(read_lines(record)) < limit:
        outcome = read_outcome(run.run.folder)
        if outcome is not None and outcome.code in (0, 2):
            break
        codes: list[int] = []
        begun = time.monotonic()
        try:
            codes = start_once(run, world, faults, home)
        finally:
            with record.open("a") as file:
                file.write(json.dumps({"codes": codes, "seconds": time.monotonic() - begun}) + "\n")
    starts = read_lines(record)
    return History([start["codes"] for start in starts], sum(start["seconds"] for start in starts))


def start_once(run: RunConfig, world: int, faults: list[Any], home: Path) -> list[int]:
    """One start of all ranks; when one fails the others are ended, as torchrun does. Returns their
    exit codes.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = [
        CONTEXT.Process(target=_rank, args=(rank, world, port, run, faults, home))
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            begin(rank)
        while all(rank.is_alive() for rank in ranks) or (
            any(rank.is_alive() for rank in ranks)
            and all(rank.exitcode in (None, 0, 75) for rank in ranks)
        ):
            time.sleep(0.02)
    finally:
        codes = finish([rank for rank in ranks if rank.pid])
    return codes


def begin(rank: Any) -> None:
    """Start a rank. A pause that is asked for meanwhile comes after it, or nobody would end it."""
    forkserver.ensure_running()  # outside, since it would hand the mask on to every rank
    pauses = {signal.SIGALRM, signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, pauses)
    try:
        rank.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def finish(ranks: list[Any]) -> list[int]:
    """End the ranks that still run, by SIGTERM and after a while by SIGKILL; those that are stopped
    by SIGKILL, since they do not hear SIGTERM. Returns the exit codes of all.
    """
    if any(rank.is_alive() for rank in ranks):
        for rank in ranks:
            rank.kill() if stopped(rank.pid) else rank.terminate()
        end = time.monotonic() + GRACE_SECONDS
        for rank in ranks:
            rank.join(max(0.0, end - time.monotonic()))
            if rank.is_alive():
                rank.kill()
    for rank in ranks:
        rank.join()
    return [rank.exitcode or 0 for rank in ranks]


def stopped(pid: int) -> bool:
    """Whether a process has got SIGSTOP."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _rank(rank: int, world: int, port: int, run: RunConfig, faults: list[Any], home: Path) -> None:
    """One rank, with the command line's way to leave."""
    os.environ |= SECRETS | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    descriptor = os.open(home / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    log.init_logger()
    from core.errors import InputError
    from tests.injector import Injector
    from train.run_context import start

    Injector(faults, home / "faults", rank)
    code = 1
    try:
        code = start(run, "cpu").code
    except InputError as error:
        print(f"error: {error}", flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)
