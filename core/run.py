"""A run: its name, its seed, and every file of its folder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"  # of a checkpoint, written last


class RunFiles:
    """The files of a run's folder, named here and nowhere else.

    Written by training: config, metrics, incidents, outcome, starts, lock, heartbeats, checkpoints,
    profile, tensorboard, curves, report. By evaluation: hf, evaluation, scores, card. By launch:
    attempts, logs, plan, dryrun.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"  # every value, and the commit of the code
        # a line per step, and one per checkpoint whose scores came in
        self.metrics = folder / "metrics.jsonl"
        self.incidents = folder / "incidents.jsonl"  # what happened besides steps
        # how the last start ended; absent while it runs and after a crash
        self.outcome = folder / "outcome.json"
        self.starts = folder / "starts.json"  # starts from the same tokens
        self.lock = folder / "run.lock"  # of the one job that writes here
        self.heartbeats = folder / "heartbeats"  # a file per rank, and stacks of ranks that hung
        self.checkpoints = folder / "checkpoints"
        self.profile = folder / "profile"
        self.tensorboard = folder / "tensorboard"
        self.curves = folder / "curves.png"
        self.report = folder / "report.html"
        self.hf = folder / "hf"  # the newest checkpoint for transformers
        self.evaluation = folder / "eval.json"  # held-out scores and a sample
        self.scores = folder / "scores"  # leaderboards, a file per suite and checkpoint
        self.score_jobs = self.scores / "jobs.json"  # which were started
        self.pinned_checkpoints = (
            self.scores / "held"
        )  # checkpoints whose jobs have not ended, by hard links
        self.card = folder / "README.md"
        self.attempts = folder / "attempts.jsonl"  # a batch script's starts and ends
        self.logs = folder / "logs"  # a folder per start, a file per node
        self.plan = folder / "plan.json"
        self.dryrun = folder / "dryrun.json"

    def hf_export(self, step: str) -> Path:
        """Where the export of a checkpoint that was asked for by name lies."""
        return self.folder / f"hf-{step}"

    @staticmethod
    def export_record(hf: Path) -> Path:
        """Origin of an export: `export.json` by `hf`, `export-step-N.json` by `hf-step-N`."""
        return hf.with_name(f"export{hf.name.removeprefix('hf')}.json")


@dataclass
class Run:
    """Name, place and seed of a run: everything it writes lies in one folder."""

    name: str
    dir: str
    seed: int  # of the initial weights
    init_from: str | None = None  # instead of random weights
    # what the commands of eval/ read instead of the newest one: a step-N folder, or for
    # leaderboards also a Hugging Face folder
    checkpoint: str | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.dir)

    @property
    def files(self) -> RunFiles:
        """The files in it."""
        return RunFiles(self.folder)


def list_checkpoints(checkpoints: Path) -> Iterator[Path]:
    """Checkpoint folders, newest first; whoever reads one verifies it before."""
    found = [path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    yield from sorted(found, key=step_number, reverse=True)


def list_committed_checkpoints(checkpoints: Path) -> Iterator[Path]:
    """Those of them that were written to the end: a manifest is a checkpoint's last file."""
    return (path for path in list_checkpoints(checkpoints) if (path / MANIFEST).is_file())


def step_number(folder: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(folder.name.removeprefix("step-"))
