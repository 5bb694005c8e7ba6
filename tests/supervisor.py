"""Launcher for tests: starts ranks as processes and restarts them like torchrun and a requeued job.

The ranks are forks of a process that has imported everything, so a restart takes a fraction of a
second. They run start() of train/run_context.py and exit with the codes of the command.
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
from core.records import read_typed_lines
from tests.start_faults import REFUSED
from train.config import RunConfig
from train.resilience.incidents import read_outcome

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])
GRACE_SECONDS = 60.0  # between SIGTERM and SIGKILL, for peers of a failed rank
CANARY = "canary-5e1f-not-for-any-file"
# environment of every rank; no server listens at this address
SECRETS = {
    "WANDB_API_KEY": CANARY,
    "FALCON_TEST_SECRET": CANARY,
    "WANDB_BASE_URL": "http://127.0.0.1:9",
}


@dataclass
class History:
    """Exit codes of all ranks per start, empty if the start was interrupted, and total seconds."""

    codes: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def starts(self) -> int:
        """Number of starts."""
        return len(self.codes)


def supervise(
    run: RunConfig, world: int, faults: list[Any], log_dir: Path, limit: int = 200
) -> History:
    """Start the ranks until outcome.json says that the run has finished or failed.

    Logs are written to `log_dir`. After Ctrl-C the ranks save and exit, and another call with the
    same arguments continues.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    record = log_dir / "starts.jsonl"
    while len(starts_of(record)) < limit:
        outcome = read_outcome(run.run.folder)
        if outcome is not None and outcome.code in (0, 2):
            if outcome.code == 0 or not is_expected(log_dir, faults, starts_of(record)):
                break
            run.run.files.outcome.unlink()  # somebody has mended what the reason names
        codes: list[int] = []
        started_at = time.monotonic()
        try:
            codes = start_once(run, world, faults, log_dir)
        finally:
            with record.open("a") as file:
                file.write(
                    json.dumps({"codes": codes, "seconds": time.monotonic() - started_at}) + "\n"
                )
    starts = starts_of(record)
    return History([start["codes"] for start in starts], sum(start["seconds"] for start in starts))


def starts_of(record: Path) -> list[dict[str, Any]]:
    """Exit codes and seconds of every start so far."""
    return list(read_typed_lines(record, dict[str, Any]))


def is_expected(log_dir: Path, faults: list[Any], starts: list[dict[str, Any]]) -> bool:
    """Whether there are at most as many refused starts as faults that refuse one have fired."""
    fired = sum(f.kind in REFUSED and (log_dir / "faults" / f.name).exists() for f in faults)
    return sum(2 in start["codes"] for start in starts) <= fired


def start_once(run: RunConfig, world: int, faults: list[Any], log_dir: Path) -> list[int]:
    """Start all ranks once; returns their exit codes. If one fails, the others are ended."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = [
        CONTEXT.Process(target=_rank, args=(rank, world, port, run, faults, log_dir))
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            start_rank(rank)
        while all(rank.is_alive() for rank in ranks) or (
            any(rank.is_alive() for rank in ranks)
            and all(rank.exitcode in (None, 0, 75) for rank in ranks)
        ):
            time.sleep(0.02)
    finally:
        codes = end_ranks([rank for rank in ranks if rank.pid])
    return codes


def start_rank(rank: Any) -> None:
    """Start a rank. Signals to pause are blocked meanwhile, so that the rank is not orphaned."""
    forkserver.ensure_running()  # before the mask, which every rank would inherit
    pause_signals = {signal.SIGALRM, signal.SIGINT, signal.SIGTERM}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, pause_signals)
    try:
        rank.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def end_ranks(ranks: list[Any]) -> list[int]:
    """End running ranks by SIGTERM, after GRACE_SECONDS by SIGKILL; returns all exit codes.

    Stopped ranks get SIGKILL at once, since they cannot handle SIGTERM.
    """
    if any(rank.is_alive() for rank in ranks):
        for rank in ranks:
            rank.kill() if is_stopped(rank.pid) else rank.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
            if rank.is_alive():
                rank.kill()
    for rank in ranks:
        rank.join()
    return [rank.exitcode or 0 for rank in ranks]


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by SIGSTOP."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _rank(
    rank: int, world: int, port: int, run: RunConfig, faults: list[Any], log_dir: Path
) -> None:
    """Run one rank and exit with the code of the command."""
    os.environ |= SECRETS | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    descriptor = os.open(log_dir / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for number in (signal.SIGHUP, signal.SIGINT):  # which nohup and `&` of a shell ignore
        signal.signal(number, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    log.init_logger()
    from core.errors import InputError
    from tests.injector import Injector
    from train.run_context import start

    injector = Injector(faults, log_dir / "faults", rank)
    code = 1
    try:
        code = start(injector.at_start(run), "cpu").code
    except InputError as error:
        print(f"error: {error}", flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    injector.log_seconds()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)
