"""Run jobs on this machine, one after another, with the requeue rules of the batch script."""

import logging
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from core.files import ROOT
from core.launcher import handle_signals
from core.run import RunFiles
from launch.jobs.sweep import SCRIPTS, Job
from launch.jobs.torchrun import SHUTDOWN_SECONDS
from train.resilience.incidents import FINISHED, INTERRUPTED, read_outcome

logger = logging.getLogger(__name__)


def run_jobs(jobs: list[Job], stages: list[str], dry_run: bool) -> int:
    """Run every stage of every job and return an exit code.

    Continues with the next job after a failure; Ctrl-C and other signals stop all jobs.
    """
    failed = []
    for number, job in enumerate(jobs, 1):
        run = job.config.run
        logger.info(f"\n== {number} of {len(jobs)}: {run.name}")
        for stage in stages:
            command = [*stage_command(job, stage), *job.arguments]
            logger.info(f"== {shlex.join(command)}")
            if dry_run:
                continue
            result = run_until_done(command, run.folder if stage == "train" else None)
            if result == "interrupted":
                logger.warning(
                    f"{run.name} ({stage}) was stopped by a signal: the same command continues"
                )
                return INTERRUPTED
            if result == "failed":
                failed.append(f"{run.name} ({stage})")
                break
    if failed:
        logger.error(f"failed: {', '.join(failed)}; run the same command to continue")
    return 1 if failed else 0


def stage_command(job: Job, stage: str) -> list[str]:
    """Command of a stage, without overrides."""
    command = [sys.executable]
    if stage == "train":
        # -P: files of the working folder do not shadow packages
        command += ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(job.config.cluster.ranks_per_node)]
        command += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    return [*command, str(ROOT / SCRIPTS[stage])]


def run_until_done(command: list[str], run: Path | None) -> str:
    """Start a stage until it is "done", "failed" or "interrupted" (a signal to this process).

    The outcome of training is read from the folder `run`; the exit code says it where a full disk
    has left none. An interrupted training (health.stop_after_seconds, a signal to a rank) is
    started again.
    """
    while True:
        if run is not None:
            previous = read_outcome(run)
            if previous is None or previous.code != FINISHED:
                RunFiles(run).outcome.unlink(missing_ok=True)
        code, is_interrupted = wait(command)
        if code == 0:
            return "done"
        if is_interrupted:
            return "interrupted"
        outcome = read_outcome(run) if run is not None else None
        if run is None or (code if outcome is None else outcome.code) != INTERRUPTED:
            return "failed"
        reason = "interrupted" if outcome is None else outcome.reason
        logger.info(f"== {reason}; starting it again")


def wait(command: list[str]) -> tuple[int, bool]:
    """Run a command; return its exit code, and whether a signal asked to stop.

    The command is in a process group of its own, to which this process passes signals on, so that
    it gets each one once, whether from a terminal or by `kill`. It needs time to save.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    with subprocess.Popen(command, env=environment, process_group=0) as process:
        previous = handle_signals(pass_on)
        try:
            return process.wait(), bool(received)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
