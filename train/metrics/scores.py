"""Scores of evaluation jobs, into the records of a run that is over."""

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
from train.metrics.sinks import say, trackers
from train.resilience.run_lock import RunLock

logger = logging.getLogger(__name__)
AGAIN_SECONDS = 5.0
# for a run that lives to take them: it looks once in POLL_SECONDS, between two steps
PATIENCE = 5 * POLL_SECONDS


def collecting(folder: Path) -> list[str]:
    """The command that takes in the scores of a run."""
    return [sys.executable, str(ROOT / "train" / "collect_scores.py"), str(folder.resolve())]


def collect(folder: Path) -> int:
    """Write the scores that nobody has recorded yet; returns how many records. Waits while another
    job does the same.

    Raises InputError when the folder is no run's.
    """
    files = RunFiles(folder)
    if not files.config.is_file():
        raise InputError(f"{folder} has no config.yaml: name the folder of a run")
    config = load_config(files.config)
    run = Run(config.run.name, str(folder), config.run.seed)
    settings: Any = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(JobsConfig), config.leaderboard.jobs)
    )
    run_lock, path = RunLock(folder), files.metrics
    end = time.monotonic() + PATIENCE
    while True:
        jobs = SuiteJobs(run, settings)
        jobs.mark_reported(read_scores(path))
        records = jobs.collect()
        if not records:
            return 0
        try:
            run_lock.acquire()
        except InputError as error:  # the run itself, or another job at its end
            if time.monotonic() > end:
                logger.info(f"the run records its scores itself: {error}")
                return 0
            time.sleep(AGAIN_SECONDS)
            continue
        try:
            jobs = SuiteJobs(run, settings)  # somebody may have taken them in the meantime
            jobs.mark_reported(read_scores(path))
            return _write(folder, config, jobs.collect())
        finally:
            run_lock.release()


def _write(folder: Path, config: Any, records: list[dict[str, Any]]) -> int:
    """Append the records and show them wherever the run is shown."""
    if not records:
        return 0
    wanted: Any = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(MetricsConfig), config.metrics)
    )
    path = RunFiles(folder).metrics
    last = max((record["tokens"] for record in read_lines(path)), default=0)
    file = JsonLines(path, last)
    views = trackers(folder, config.run.name, wanted, OmegaConf.to_container(config), last)  # type: ignore[arg-type]
    for record in records:
        file.write(record)
        say(record)
        for view in views:
            view.log(record)
    file.close()
    for view in views:
        view.close()
    return len(records)
