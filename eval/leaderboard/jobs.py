"""Leaderboards while a run goes on: jobs of their own on saved checkpoints, scores back to the run.

The first rank looks now and then for committed checkpoints that are due: the first past each
multiple of every_tokens, the last one before the decay and the run's last. It holds their files by
hard links (retention may remove the original while the job waits) and starts `eval/run.py` on them,
here or by Slurm. What was started stands in scores/jobs.json, so that a resumed run starts nothing
twice; what was reported stands in the run's own records.
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
from typing import Any

from core.files import ROOT, read_json, write_json
from core.run import Run, iter_committed_checkpoints, step_number
from eval.config import Jobs, Launcher
from model.checkpoint import read_state

logger = logging.getLogger(__name__)

LOOK_SECONDS = 60.0
OF_A_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class SuiteJobs:
    """The jobs of one run; only its first rank uses them."""

    def __init__(
        self, run: Run, settings: Jobs, *, always: Collection[int] = (), after: Sequence[str] = ()
    ) -> None:
        """Score `always` tokens whatever every_tokens says; end each job with command `after`."""
        self.run, self.settings, self.always, self.after = run, settings, always, after
        self.scores = run.files.scores
        self.record = run.files.score_jobs
        self.reported: set[tuple[int, str]] = set()  # step, suite
        self.next_look = 0.0

    def mark_reported(self, records: Sequence[dict[str, Any]]) -> None:
        """Take these records of scores for reported."""
        self.reported |= {
            (record["step"], suite) for record in records for suite in record["scores"]
        }

    def poll(self, *, now: bool = False) -> list[dict[str, Any]]:
        """Start what is due, at most once in LOOK_SECONDS or now; returns scores that have come in
        since.

        A record holds the step and the tokens of a checkpoint, and scores in percent by suite and
        row.
        """
        if not self.settings.suites or (time.monotonic() < self.next_look and not now):
            return []
        self.next_look = time.monotonic() + LOOK_SECONDS
        self.scores.mkdir(parents=True, exist_ok=True)
        started: dict[str, int] = read_json(self.record).get("started", {})
        for folder, tokens in self._due(started):
            started[folder.name] = tokens
            write_json(self.record, {"started": started})
            self._hold_and_launch(folder)
        return self.collect()

    def _due(self, started: dict[str, int]) -> list[tuple[Path, int]]:
        """Checkpoints that no job was started for and that are due, oldest first."""
        found = []
        before = max(started.values(), default=0)
        for folder in reversed(list(iter_committed_checkpoints(self.run.files.checkpoints))):
            tokens = int(read_state(folder)["tokens"])
            every = self.settings.every_tokens
            if tokens > before and (tokens // every > before // every or tokens in self.always):
                found.append((folder, tokens))
                before = tokens
        return found

    def _hold_and_launch(self, folder: Path) -> None:
        """Every suite as a job on the held files of a checkpoint."""
        held = self.run.files.pinned_checkpoints / folder.name
        shutil.copytree(folder, held, copy_function=os.link, dirs_exist_ok=True)
        for suite in self.settings.suites:
            self._launch(suite, held)

    def _launch(self, suite: str, held: Path) -> None:
        """Start a job: python eval/run.py on the held checkpoint, then the command `after`."""
        name = f"{suite}-{held.name}"
        words = [
            sys.executable,
            str(ROOT / "eval" / "run.py"),
            f"checkpoint={held.resolve()}",
            f"suite={suite}",
        ]
        words += [
            f"run.name='{self.run.name}'",
            f"run.dir='{self.run.folder.resolve()}'",
            *self.settings.overrides,
        ]
        script = "; ".join(shlex.join(part) for part in (words, self.after) if part)
        log = self.scores / f"{name}.log"
        command = ["sh", "-c", script]
        if self.settings.launcher is Launcher.slurm:
            command = [
                "sbatch",
                f"--job-name={name}",
                f"--output={log}",
                *self.settings.sbatch,
                f"--wrap={script}",
            ]
        environment = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
        environment = {
            key: value for key, value in environment.items() if not key.startswith("TORCHELASTIC")
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
            logger.info(f"evaluation: {name} started, {log}")
        except OSError as error:  # no sbatch here: the run does not stop for it
            logger.warning(f"{name} could not be started ({error})")

    def collect(self) -> list[dict[str, Any]]:
        """Scores of ended jobs not reported before; releases the checkpoints they held."""
        records = []
        started: dict[str, int] = read_json(self.record).get("started", {})
        for name, tokens in sorted(started.items(), key=lambda item: item[1]):
            step = step_number(Path(name))
            ended = {suite: self._ended(f"{suite}-{name}") for suite in self.settings.suites}
            new = {
                suite: rows
                for suite, rows in ended.items()
                if rows and (step, suite) not in self.reported
            }
            if new:
                records.append({"step": step, "tokens": tokens, "scores": new})
            if None not in ended.values():
                shutil.rmtree(self.run.files.pinned_checkpoints / name, ignore_errors=True)
        self.mark_reported(records)
        return records

    def _ended(self, name: str) -> dict[str, float] | None:
        """Scores of a job's rows, with their average if all exist; None while the job runs."""
        result = read_json(self.scores / f"{name}.json")
        if not result.get("complete") and not result.get("missing"):
            return None
        rows = {label: float(row["score"]) for label, row in result["rows"].items()}
        return {**rows, "average": sum(rows.values()) / len(rows)} if result["complete"] else rows
