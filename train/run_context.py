"""What surrounds a run in its folder: lease, signals, watchdog, and a record of how it ended."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from typing import Any

from omegaconf import OmegaConf

from core.errors import USER_ERROR, InputError
from core.files import ROOT, remove_stale_temp_files, write_text
from core.run import Run
from train.build import build_trainer
from train.config import RunConfig
from train.distributed import Ranks, init_distributed, raise_on_all_ranks
from train.metrics.profiler import profiling
from train.resilience.config import HealthConfig
from train.resilience.datacheck import open_per_node
from train.resilience.incidents import FINISHED, Outcome, read_outcome
from train.resilience.run_lock import RunLock
from train.resilience.stop_request import StopRequest
from train.resilience.watchdog import Watchdog

logger = logging.getLogger(__name__)

# what gloo, NCCL and the checkpoint writer say on the ranks that did not fail themselves
LOST_PEER = re.compile(r"by peer|remote process exited|NCCL|a rank is gone")


def run_context(
    run: Run, health: HealthConfig, ranks: Ranks, body: Callable[[Watchdog, StopRequest], Outcome]
) -> Outcome:
    """Run `body` on every rank while this job alone holds the run's folder; returns how it ended,
    on disk too.

    Raises InputError, on every rank, when another job holds the folder or it cannot be written.
    """
    folder = run.folder
    before = read_outcome(folder)
    run_lock = RunLock(folder)
    raise_on_all_ranks(_take(run_lock) if ranks.is_first else None)
    watchdog = Watchdog(folder, ranks.rank, ranks.world_size, health.hang_seconds)
    try:
        if (
            before is not None
            and before.code != FINISHED
            and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        ):
            # torchrun restarts whatever does not exit with 0: what asked to leave stays out
            return before
        if ranks.is_first:
            run.files.outcome.unlink(missing_ok=True)
        watchdog.begin(run_lock if ranks.is_first else None)
        stop_request = StopRequest(health.stop_after_seconds, health.stop_margin_seconds)
        stop_request.install()
        logger.info(f"{ranks.world_size} ranks have met; building the model")
        outcome = body(watchdog, stop_request)
        if ranks.is_first:
            outcome.write(folder)
        return outcome
    except InputError as error:
        if ranks.is_first:
            Outcome(USER_ERROR, str(error)).write(folder)
        raise
    except Exception as error:
        text = f"rank {ranks.rank} on {watchdog.who['host']}: {type(error).__name__}: {error}"
        watchdog.incidents.log(
            "lost a peer" if LOST_PEER.search(str(error)) else "crash", text, rank=ranks.rank
        )
        # which the command line takes for a mistake; in the middle of a run it is none
        if isinstance(error, OSError):
            raise RuntimeError(text) from error
        raise
    finally:
        # after a crash it goes on watching, for leaving a broken process group may hang; but never
        # for another job
        watchdog.run_lock = None
        run_lock.release()
        if sys.exc_info()[0] is None:
            watchdog.end()


def start(config: RunConfig, device: str) -> Outcome:
    """Train with the ranks that the launcher started, from the newest checkpoint on."""
    with init_distributed(
        device, config.parallel.tensor_parallel, config.parallel.context_parallel
    ) as ranks:
        return run_context(
            config.run,
            config.health,
            ranks,
            lambda watchdog, stop_request: _train(config, ranks, watchdog, stop_request),
        )


def _train(
    config: RunConfig, ranks: Ranks, watchdog: Watchdog, stop_request: StopRequest
) -> Outcome:
    record = {"code": code_version() if ranks.is_first else None, **plain(asdict(config))}
    manifests = open_per_node(config.data)
    # refuses a folder of another run before its record changes
    trainer = build_trainer(config, manifests, ranks, record, watchdog, stop_request)
    if ranks.is_first:
        write_text(config.run.files.config, OmegaConf.to_yaml(OmegaConf.create(record)))
    with profiling(config.train.profile, config.run.folder, ranks, trainer.phases):
        outcome = trainer.run()
    if ranks.is_first and outcome.code == FINISHED:
        from train.metrics.curves import draw

        logger.info(
            f"checkpoints: {config.run.files.checkpoints}\ncurves: {draw(config.run.folder)}"
        )
    return outcome


def code_version() -> dict[str, Any]:
    """Commit of the running code, and whether files differ; empty without git or repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    try:
        if git("rev-parse", "--show-prefix") != "":  # installed somewhere inside another repository
            return {}
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {}


def plain(value: Any) -> Any:
    """A config as plain JSON-like values."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value.value if isinstance(value, Enum) else value


def _take(run_lock: RunLock) -> str | None:
    """Why the folder cannot be had, or None."""
    try:
        run_lock.path.parent.mkdir(parents=True, exist_ok=True)
        run_lock.acquire()
        remove_stale_temp_files(run_lock.path.parent)
    except InputError as error:
        return str(error)
    except OSError as error:
        folder = run_lock.path.parent
        return (
            f"run.dir {folder} cannot be written ({error}): choose another, or fix its permissions"
        )
    return None
