"""Runs on this machine, one after another, as a batch script would start them."""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

from core.files import ROOT
from core.run import RunFiles
from launch.jobs.sweep import SCRIPTS, Job
from train.resilience.incidents import FINISHED, REQUEUE, read_outcome

logger = logging.getLogger(__name__)


def run_here(jobs: list[Job], stages: list[str], dry_run: bool) -> int:
    """Run every stage of every run. Go on after a failure, report it last; Ctrl-C ends all runs."""
    failed = []
    for number, each in enumerate(jobs, 1):
        logger.info(f"\n== {number} of {len(jobs)}: {each.config.run.name}")
        for stage in stages:
            command = [*start_of(each, stage), *each.overrides]
            logger.info(f"== {shlex.join(command)}")
            how = (
                "done"
                if dry_run
                else through(command, each.config.run.folder if stage == "train" else None)
            )
            if how == "left":
                logger.warning(
                    f"{each.config.run.name} ({stage}) was asked to leave: the same command goes on"
                )
                return REQUEUE
            if how == "failed":
                failed.append(f"{each.config.run.name} ({stage})")
                break
    if failed:
        logger.error(f"failed: {', '.join(failed)}; the same command goes on where they stopped")
    return 1 if failed else 0


def start_of(each: Job, stage: str) -> list[str]:
    """The command of a stage, up to its overrides."""
    start = [sys.executable]
    if stage == "train":
        # -P: nothing in the working folder is taken for a package
        start += ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        start += [str(each.config.cluster.ranks_per_node)]
    return [*start, str(ROOT / SCRIPTS[stage])]


def through(command: list[str], run: Path | None) -> str:
    """Start a stage until it has ended: done, failed, or left because somebody pressed Ctrl-C.

    torchrun turns every exit code into 1, so how training ended is read from its run's folder: a
    start that saved and wants another one (health.stop_after_seconds, a signal to a rank) gets it.
    """
    while True:
        if run is not None and (old := read_outcome(run)) is not None and old.code != FINISHED:
            RunFiles(run).outcome.unlink()  # of an earlier start
        code, asked = wait(command)
        if code == 0:
            return "done"
        if asked:
            return "left"
        how = read_outcome(run) if run is not None else None
        if how is None or how.code != REQUEUE:
            return "failed"
        logger.info(f"== requeue: {how.reason}")


def wait(command: list[str]) -> tuple[int, bool]:
    """Exit code and whether Ctrl-C was pressed; the command gets it too and needs time to save."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    asked = False
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                return process.wait(), asked
            except KeyboardInterrupt:
                asked = True
