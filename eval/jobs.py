"""Leaderboards while a run goes on: jobs of their own on saved checkpoints, scores back to the run.

The first rank looks now and then for a committed checkpoint past the next multiple of every_tokens, holds its files by
hard links (retention may remove the original while the job waits) and starts `eval/run.py` on it, here or by Slurm.
What was started stands in scores/jobs.json, so that a resumed run starts nothing twice.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from eval.checkpoint import read_result, write_result
from eval.config import Jobs, Launcher, Run
from model.weights import MANIFEST, newest, read_state

ROOT = Path(__file__).resolve().parent.parent
LOOK_SECONDS = 60.0
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class SuiteJobs:
    """The jobs of one run; only its first rank makes one."""

    def __init__(self, run: Run, settings: Jobs) -> None:
        self.run, self.settings = run, settings
        self.scores = run.folder / "scores"
        self.record = self.scores / "jobs.json"
        self.next_look = 0.0

    def look(self) -> dict[str, Any] | None:
        """Start what is due, at most once in LOOK_SECONDS; returns scores that have come in since, by suite."""
        if not self.settings.suites or time.monotonic() < self.next_look:
            return None
        self.next_look = time.monotonic() + LOOK_SECONDS
        self.scores.mkdir(parents=True, exist_ok=True)
        state = {"started": {}, "reported": [], **read_result(self.record)}
        self._start_due(state["started"])
        news = self._news(state)
        write_result(self.record, state)
        return news or None

    def _start_due(self, started: dict[str, int]) -> None:
        """Start the suites on the newest checkpoint when it is the first past a multiple of every_tokens."""
        folder = next((f for f in newest(self.run.checkpoints) if (f / MANIFEST).is_file()), None)
        if folder is None:
            return
        tokens = int(read_state(folder)["tokens"])
        every = self.settings.every_tokens
        if tokens // every <= max((then // every for then in started.values()), default=0):
            return
        started[folder.name] = tokens
        held = self.scores / "held" / folder.name
        shutil.copytree(folder, held, copy_function=os.link, dirs_exist_ok=True)
        for suite in self.settings.suites:
            self._launch(suite, held)

    def _launch(self, suite: str, held: Path) -> None:
        """One job: python eval/run.py on the held checkpoint."""
        name = f"{suite}-{held.name}"
        command = [sys.executable, str(ROOT / "eval" / "run.py"), f"checkpoint={held.resolve()}", f"suite={suite}"]
        command += [f"run.name='{self.run.name}'", f"run.dir='{self.run.folder.resolve()}'"]
        command += self.settings.overrides
        log = self.scores / f"{name}.log"
        if self.settings.launcher is Launcher.slurm:
            quoted = " ".join(f"'{word}'" if "'" not in word else f'"{word}"' for word in command)
            command = ["sbatch", f"--job-name={name}", f"--output={log}", *self.settings.sbatch, f"--wrap={quoted}"]
        environment = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
        environment = {key: value for key, value in environment.items() if not key.startswith("TORCHELASTIC")}
        try:
            with log.open("ab") as out:
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            print(f"evaluation: {name} started, {log}", flush=True)
        except OSError as error:  # no sbatch here: the run does not stop for it
            print(f"warning: {name} could not be started ({error})", flush=True)

    def _news(self, state: dict[str, Any]) -> dict[str, Any]:
        """Complete results that were not reported before; what they were made of is let go."""
        news: dict[str, Any] = {}
        for step, tokens in sorted(state["started"].items(), key=lambda item: item[1]):
            for suite in self.settings.suites:
                name = f"{suite}-{step}"
                result = read_result(self.scores / f"{name}.json")
                if name in state["reported"] or not result.get("complete"):
                    continue
                news[suite] = {"tokens": tokens, **{label: row["score"] for label, row in result["rows"].items()}}
                state["reported"].append(name)
            if all(f"{suite}-{step}" in state["reported"] for suite in self.settings.suites):
                shutil.rmtree(self.scores / "held" / step, ignore_errors=True)
        return news
