"""Leaderboard jobs on a run's saved checkpoints.

Rank 0 polls for committed checkpoints that are due: the first past each multiple of every_tokens,
the last one before the decay and the run's last. It pins their files by hard links, because
retention may delete the checkpoint while the job waits, and starts `eval/run.py` locally or with
Slurm. scores/jobs.json lists the started jobs, so that a resumed run starts none twice. The run's
metrics.jsonl holds the reported scores.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from core.files import ROOT, make_folder, sync_folder, write_json
from core.overrides import config_dir_options, own_config_dir
from core.quote import hydra_override, sbatch_output
from core.ranges import Whole
from core.records import DamagedRecord, read_if_present, report_once
from core.run import Run, iter_committed_checkpoints, step_number
from eval.config import JobsConfig, Launcher
from eval.leaderboard.stored import read_stored
from model.checkpoint import read_tokens

logger = logging.getLogger(__name__)

POLL_SECONDS = 60.0
LAUNCHER_VARIABLES = (  # of torchrun; jobs must not inherit them
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class JobsRecord(TypedDict):
    """Content of jobs.json: tokens of the checkpoints with a job, by folder name."""

    started: dict[Annotated[str, Field(pattern=r"^step-\d{8,}$")], Whole]


class SuiteJobs:
    """Suite jobs of one run; only rank 0 uses them."""

    def __init__(
        self,
        run: Run,
        settings: JobsConfig,
        *,
        always: Collection[int] = (),
        then: Sequence[str] = (),
    ) -> None:
        """Also score checkpoints at `always` tokens; each job ends by running command `then`."""
        self.run = run
        self.settings = settings
        self.always = always
        self.then = then
        self.scores = run.files.scores
        self.record = run.files.score_jobs
        self.reported: set[tuple[int, str]] = set()  # step, suite
        self.next_poll = 0.0

    def mark_reported(self, records: Sequence[dict[str, Any]]) -> None:
        """Do not return the scores of these records again."""
        self.reported |= {
            (record["step"], suite) for record in records for suite in record["scores"]
        }

    def poll(self, *, now: bool = False) -> list[dict[str, Any]]:
        """Start jobs that are due and return new scores.

        Returns [] within POLL_SECONDS of the last poll unless `now`. A record contains the step and
        tokens of a checkpoint, and scores in percent by suite and row.
        """
        if not self.settings.suites or (time.monotonic() < self.next_poll and not now):
            return []
        self.next_poll = time.monotonic() + POLL_SECONDS
        try:
            make_folder(self.scores)
            started = self._read_started()
            if started is None:
                return []
            for folder, tokens in self._due(started):
                self._start(folder, {**started, folder.name: tokens})
                started[folder.name] = tokens
        except OSError as error:  # a full disk, or retention was faster: training continues
            report_once(f"evaluation jobs cannot be started, the next poll tries again: {error}")
        return self.collect()

    def _read_started(self) -> dict[str, int] | None:
        """Checkpoints with a job; None, with a warning, if that is not known.

        An empty list in place of a damaged one would start every job again.
        """
        fix = "no jobs are started or collected until it is restored or removed"
        try:
            record = read_if_present(self.record, JobsRecord, fix)
        except DamagedRecord as error:
            report_once(str(error))
            return None
        return {} if record is None else record["started"]

    def _due(self, started: dict[str, int]) -> list[tuple[Path, int]]:
        """Checkpoints that are due and have no job yet, oldest first."""
        due = []
        last_tokens = max(started.values(), default=0)
        for folder in reversed(list(iter_committed_checkpoints(self.run.files.checkpoints))):
            tokens = read_tokens(folder)
            if tokens is None:  # a copied folder, or damaged: the next start sets it aside
                continue
            every = self.settings.every_tokens
            past_multiple = tokens // every > last_tokens // every
            if tokens > last_tokens and (past_multiple or tokens in self.always):
                due.append((folder, tokens))
                last_tokens = tokens
        return due

    def _start(self, folder: Path, started: dict[str, int]) -> None:
        """Hard-link a checkpoint's files, record its jobs, start one per suite. Raises OSError."""
        pinned = self.run.files.pinned_checkpoints / folder.name
        shutil.rmtree(pinned, ignore_errors=True)  # of a start that failed
        make_folder(pinned.parent)
        shutil.copytree(folder, pinned, copy_function=os.link)
        sync_folder(pinned)
        write_json(self.record, {"started": started})
        for suite in self.settings.suites:
            self._launch(suite, pinned)

    def _launch(self, suite: str, pinned: Path) -> None:
        """Start a job: python eval/run.py on the pinned checkpoint, then the command `then`."""
        name = f"{suite}-{pinned.name}"
        evaluate = [
            sys.executable,
            str(ROOT / "eval" / "run.py"),
            *config_dir_options(own_config_dir()),
            hydra_override("run.checkpoint", str(pinned.resolve())),
            f"suite={suite}",
            hydra_override("run.name", self.run.name),
            hydra_override("run.dir", str(self.run.folder.resolve())),
            *self.settings.overrides,
        ]
        script = "; ".join(shlex.join(command) for command in (evaluate, self.then) if command)
        log = self.scores / f"{name}.log"
        command = ["sh", "-c", script]
        if self.settings.launcher is Launcher.slurm:
            command = [
                "sbatch",
                f"--job-name={name}",
                sbatch_output(self.scores, log.name),
                *self.settings.sbatch_options,
                f"--wrap={script}",
            ]
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in LAUNCHER_VARIABLES and not key.startswith("TORCHELASTIC")
        }
        try:
            with log.open("ab") as out:
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            logger.info(f"started evaluation job {name}, log in {log}")
        except OSError as error:  # e.g. no sbatch; training continues
            logger.warning(f"cannot start evaluation job {name}: {error}")

    def collect(self) -> list[dict[str, Any]]:
        """Return unreported scores of finished jobs and delete their pinned checkpoints."""
        records = []
        started = self._read_started() or {}
        for name, tokens in sorted(started.items(), key=lambda item: item[1]):
            step = step_number(Path(name))
            finished = {
                suite: self._read_finished(f"{suite}-{name}") for suite in self.settings.suites
            }
            new = {
                suite: rows
                for suite, rows in finished.items()
                if rows and (step, suite) not in self.reported
            }
            if new:
                records.append({"step": step, "tokens": tokens, "scores": new})
            if None not in finished.values():
                shutil.rmtree(self.run.files.pinned_checkpoints / name, ignore_errors=True)
        self.mark_reported(records)
        return records

    def _read_finished(self, name: str) -> dict[str, float] | None:
        """Scores of a job's rows, and their average if none is missing; None while it runs."""
        result = read_stored(self.scores / f"{name}.json", "remove it and score the suite again")
        if not result.get("complete") and not result.get("missing"):
            return None
        rows = {label: float(row["score"]) for label, row in result["rows"].items()}
        if not rows or not result["complete"]:
            return rows
        return {**rows, "average": sum(rows.values()) / len(rows)}
