"""Context of a run: lock of its folder, signals, watchdog, and the record of how it ended."""

import errno
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from core.console import table_console
from core.errors import USER_ERROR, InputError
from core.files import check_folder, make_folder, remove_stale_temp_files
from core.run import Run
from train.build import build_trainer
from train.config import RunConfig
from train.distributed import (
    Ranks,
    broadcast_text,
    connect,
    parallel_groups,
    raise_on_all_ranks,
)
from train.metrics.profiler import profiling
from train.record.history import code_version
from train.resilience.agreement import check_agreement, start_facts
from train.resilience.config import HealthConfig
from train.resilience.datacheck import open_per_node
from train.resilience.incidents import (
    FINISHED,
    Outcome,
    read_outcome,
    reserve_space,
    sync_records,
)
from train.resilience.run_lock import RunLock
from train.resilience.stop_request import StopRequest
from train.resilience.watchdog import Watchdog

logger = logging.getLogger(__name__)

# errors of gloo, NCCL and the checkpoint writer on ranks whose peer has failed
LOST_PEER = re.compile(r"by peer|remote process exited|NCCL|a rank is gone")
# for a new file to appear on other machines of a network file system
SHARED_SECONDS = 30.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_context(
    run: Run,
    health: HealthConfig,
    facts: Mapping[str, str],
    body: Callable[[Watchdog, StopRequest], Outcome],
    launcher: int | None = None,
) -> Outcome:
    """Run `body` on every rank under the run's lock; return the outcome, and write it to disk.

    Raises InputError, on every rank, when another job holds the folder, when it cannot be written,
    and when ranks differ in `facts`. Ranks do not outlive the process `launcher`.
    """
    folder = run.folder
    rank, world_size = dist.get_rank(), dist.get_world_size()
    is_first = rank == 0
    watchdog = Watchdog(folder, rank, world_size, health.hang_seconds)
    watchdog.watch()
    previous = read_outcome(folder)
    run_lock = RunLock(folder)
    try:
        raise_on_all_ranks(_acquire(run_lock) if is_first else None)
    except InputError:  # another job's folder: nothing is written
        watchdog.stop()
        raise
    try:
        check_agreement(facts)
        _check_shared(run_lock)
        if (
            previous is not None
            and previous.code != FINISHED
            and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        ):
            # torchrun restarts ranks that exit with any other code than 0: these stay stopped
            return previous
        if is_first:
            run.files.outcome.unlink(missing_ok=True)
        watchdog.start(run_lock if is_first else None)
        stop_request = StopRequest(health.stop_after_seconds, health.stop_margin_seconds, launcher)
        stop_request.install()
        logger.info(f"{world_size} ranks connected; building the model")
        outcome = body(watchdog, stop_request)
        _end(outcome, folder, watchdog)
        return outcome
    except InputError as error:
        if is_first:
            Outcome(USER_ERROR, str(error)).write(folder)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            full = InputError(f"{error}: free space on the disk of {folder}, then start again")
            if is_first:
                Outcome(USER_ERROR, str(full)).write(folder)
            raise full from error
        text = _log_crash(watchdog, error)
        # the command line would report an OSError as a user's mistake
        if isinstance(error, OSError):
            raise RuntimeError(text) from error
        raise
    finally:
        # After a crash the watchdog continues, since destroying a broken process group may hang. It
        # must not renew the lock, which another job may hold.
        watchdog.run_lock = None
        if is_first:
            with suppress(OSError):
                run.files.outcome_space.unlink(missing_ok=True)
        run_lock.release()
        if sys.exc_info()[0] is None:
            watchdog.stop()


def _end(outcome: Outcome, folder: Path, watchdog: Watchdog) -> None:
    """Sync the run's records, then write the outcome; a rank that hangs is still watched."""
    watchdog.beat()
    if dist.get_rank() == 0:
        sync_records(folder, watchdog.beat)
        outcome.write(folder)
        watchdog.beat()
    dist.barrier()


def _log_crash(watchdog: Watchdog, error: Exception) -> str:
    """Log an error that ends this rank; returns the line."""
    kind = "lost a peer" if LOST_PEER.search(str(error)) else "crash"
    text = f"rank {watchdog.rank} on {watchdog.own.host}: {type(error).__name__}: {error}"
    watchdog.incidents.log(kind, text, rank=watchdog.rank)
    return text


def start(config: RunConfig, device: str, launcher: int | None = None) -> Outcome:
    """Train with the ranks of `launcher`, a process, from the newest checkpoint."""
    parallel = config.parallel

    def train(watchdog: Watchdog, stop_request: StopRequest) -> Outcome:
        with parallel_groups(device, parallel.tensor_parallel, parallel.context_parallel) as ranks:
            return _train(config, ranks, watchdog, stop_request)

    with connect(device):
        facts = start_facts(config, device)
        return run_context(config.run, config.health, facts, train, launcher)


def _train(
    config: RunConfig, ranks: Ranks, watchdog: Watchdog, stop_request: StopRequest
) -> Outcome:
    code = code_version() if ranks.is_first else {}
    manifests = open_per_node(config.data)
    trainer = build_trainer(config, manifests, ranks, code, watchdog, stop_request)
    with profiling(config.train.profile, config.run.folder, ranks, trainer.phases):
        outcome = trainer.run()
    watchdog.beat()
    if ranks.is_first and outcome.code == FINISHED:
        logger.info(f"checkpoints: {config.run.files.checkpoints}")
        _draw_curves(config.run.folder)
        _show_forgetting(config.run.folder)
    return outcome


def _draw_curves(folder: Path) -> None:
    """Draw the curves of a finished run; an error, as on a full disk, changes no outcome."""
    from train.metrics.curves import draw

    try:
        logger.info(f"curves: {draw(folder)}")
    except (InputError, OSError) as error:
        logger.warning(f"no curves ({error}); draw them with: python train/report.py {folder}")


def _show_forgetting(folder: Path) -> None:
    """Print the table of a finished run with initial weights; an error changes no outcome."""
    from train.metrics.forgetting import forgetting_table

    try:
        table = forgetting_table(folder)
    except InputError as error:
        logger.warning(f"no table of held-out bits per byte ({error})")
        return
    if table is not None:
        with suppress(OSError):  # standard output may go to a full disk
            table_console().print(table)


def _check_shared(run_lock: RunLock) -> None:
    """Raise InputError, on every rank, if a rank does not see the first rank's lock in run.dir."""
    content = broadcast_text(run_lock.content.decode() or " ").encode()
    end = time.monotonic() + SHARED_SECONDS
    error = None
    while not _has_content(run_lock.path, content):
        if time.monotonic() > end:
            error = (
                f"rank {dist.get_rank()} on {socket.gethostname()} does not see the files of rank "
                f"0 in run.dir {run_lock.path.parent.resolve()}: mount the same folder on every "
                "node"
            )
            break
        time.sleep(0.2)
    raise_on_all_ranks(error)


def _has_content(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _acquire(run_lock: RunLock) -> str | None:
    """Acquire the lock; return the error or None."""
    try:
        make_folder(run_lock.path.parent)
        check_folder(run_lock.path.parent, "run.dir", links=True)
        run_lock.acquire()
        reserve_space(run_lock.path.parent)
        remove_stale_temp_files(run_lock.path.parent)
    except InputError as error:
        return str(error)
    except OSError as error:
        run_lock.release()
        folder = run_lock.path.parent
        return (
            f"run.dir {folder} cannot be written ({error}): choose another or fix its permissions"
        )
    return None
