"""Write the scores of evaluation jobs into the records of a run that has ended."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from core.errors import InputError
from core.files import ROOT
from core.old_keys import load_config
from core.run import Run, RunFiles
from eval.config import JobsConfig
from eval.leaderboard.jobs import POLL_SECONDS, SuiteJobs
from train.config import MetricsConfig
from train.metrics.records import JsonLines, read_lines, read_scores
from train.metrics.sinks import log_suites, make_trackers
from train.resilience.run_lock import RunLock

logger = logging.getLogger(__name__)
RETRY_SECONDS = 5.0  # between two attempts to lock the folder
# a run that is training takes the scores itself: it looks every POLL_SECONDS, between two steps
MAX_WAIT_SECONDS = 5 * POLL_SECONDS


def collect_command(folder: Path) -> list[str]:
    """Command line of train/collect_scores.py for a run."""
    return [sys.executable, str(ROOT / "train" / "collect_scores.py"), str(folder.resolve())]


def collect(folder: Path) -> int:
    """Write the scores that are not recorded yet; returns the number of records.

    Waits up to MAX_WAIT_SECONDS while the run or another job has locked the folder, then leaves
    the scores to the run. Raises InputError when the folder holds no run.
    """
    files = RunFiles(folder)
    if not files.config.is_file():
        raise InputError(f"{folder} has no config.yaml: name the folder of a run")
    config = load_config(files.config)
    run = Run(config.run.name, str(folder), config.run.seed)
    settings: Any = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(JobsConfig), config.leaderboard.jobs)
    )
    run_lock = RunLock(folder)
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while True:
        jobs = SuiteJobs(run, settings)
        jobs.mark_reported(read_scores(files.metrics))
        if not jobs.collect():
            return 0
        try:
            run_lock.acquire()
        except InputError as error:  # held by the run or by another job
            if time.monotonic() > deadline:
                logger.info(f"the run records its scores itself: {error}")
                return 0
            time.sleep(RETRY_SECONDS)
            continue
        try:
            jobs = SuiteJobs(run, settings)  # another job may have written them meanwhile
            jobs.mark_reported(read_scores(files.metrics))
            return _write(folder, config, jobs.collect())
        finally:
            run_lock.release()


def _write(folder: Path, config: Any, records: list[dict[str, Any]]) -> int:
    """Append the records to metrics.jsonl and send them to the console and the trackers."""
    if not records:
        return 0
    metrics_config: Any = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(MetricsConfig), config.metrics)
    )
    path = RunFiles(folder).metrics
    last = max((record["tokens"] for record in read_lines(path)), default=0)
    file = JsonLines(path, None)
    run_config: Any = OmegaConf.to_container(config)
    trackers = make_trackers(folder, config.run.name, metrics_config, run_config, last)
    for record in records:
        file.write(record)
        log_suites(record)
        for tracker in trackers:
            tracker.log(record)
    file.close()
    for tracker in trackers:
        tracker.close()
    return len(records)
