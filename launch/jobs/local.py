"""Run jobs on this machine, one after another, with the requeue rules of the batch script."""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

from core.files import ROOT
from core.run import RunFiles
from launch.jobs.sweep import SCRIPTS, Job
from train.resilience.incidents import FINISHED, INTERRUPTED, read_outcome

logger = logging.getLogger(__name__)


def run_jobs(jobs: list[Job], stages: list[str], dry_run: bool) -> int:
    """Run every stage of every job and return an exit code.

    Continues with the next job after a failure; Ctrl-C stops all jobs.
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
                    f"{run.name} ({stage}) was stopped by Ctrl-C: the same command continues"
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
    return [*command, str(ROOT / SCRIPTS[stage])]


def run_until_done(command: list[str], run: Path | None) -> str:
    """Start a stage until it is "done", "failed" or "interrupted" (Ctrl-C).

    torchrun turns every exit code into 1, so the outcome of training is read from the folder `run`.
    An interrupted training (health.stop_after_seconds, a signal to a rank) is started again.
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
        if outcome is None or outcome.code != INTERRUPTED:
            return "failed"
        logger.info(f"== {outcome.reason}; starting it again")


def wait(command: list[str]) -> tuple[int, bool]:
    """Run a command; return its exit code, and whether Ctrl-C was pressed.

    Ctrl-C reaches the command too, which needs time to save, so wait for its end.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    is_interrupted = False
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                return process.wait(), is_interrupted
            except KeyboardInterrupt:
                is_interrupted = True
