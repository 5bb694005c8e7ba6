"""Run settings (name, folder, seed) and the paths of every file in a run's folder."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from core.ranges import Finite, Positive, Seed, Whole

NAME_LIMIT = 200  # with its suffixes it is a file name of at most 255 bytes
NAME = re.compile(rf"\w[\w.+=,@-]{{0,{NAME_LIMIT - 1}}}", re.A)
MANIFEST = "manifest.json"  # last file of a checkpoint to be written
# name of a committed checkpoint; every other name in the folder of the checkpoints is no checkpoint
STEP_NAME = re.compile("step-([0-9]{8}|[1-9][0-9]{8,17})")


class RunFiles:
    """Paths of the files in a run's folder; no other module names them.

    Training writes config, metrics, cut metrics, incidents, outcome, starts, lock, heartbeats,
    checkpoints, profile, tensorboard, curves, report. Evaluation writes hf, evaluation, scores,
    card. Launch writes attempts, logs, plan, dryrun.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"  # every value, and the commit of the code
        # one line per step, and one per scored checkpoint
        self.metrics = folder / "metrics.jsonl"
        self.incidents = folder / "incidents.jsonl"  # one line per event other than a step
        # how the last start ended; absent during a run and after a crash
        self.outcome = folder / "outcome.json"
        # disk space for outcome.json, which must be written when the disk is full
        self.outcome_space = folder / "outcome.space"
        self.starts = folder / "starts.json"  # number of starts from the same token count
        self.lock = folder / "run.lock"  # names the only process that may write this folder
        self.heartbeats = folder / "heartbeats"  # one file per rank, and stacks of hung ranks
        self.checkpoints = folder / "checkpoints"
        self.profile = folder / "profile"
        self.tensorboard = folder / "tensorboard"
        self.curves = folder / "curves.png"
        self.report = folder / "report.html"
        self.hf = folder / "hf"  # the newest checkpoint in transformers' format
        self.evaluation = folder / "eval.json"  # held-out scores and a sample
        self.scores = folder / "scores"  # leaderboards, one file per suite and checkpoint
        self.score_jobs = self.scores / "jobs.json"  # scoring jobs that were started
        # hard links to checkpoints that a scoring job still needs
        self.pinned_checkpoints = self.scores / "held"
        self.card = folder / "README.md"
        self.attempts = folder / "attempts.jsonl"  # starts and ends under Slurm
        self.logs = folder / "logs"  # one folder per start, one file per node
        self.plan = folder / "plan.json"
        self.dryrun = folder / "dryrun.json"

    def cut_metrics(self, tokens: int, digest: str) -> Path:
        """Records of metrics.jsonl that a resume at `tokens` cut off, by a hash of their bytes."""
        return self.folder / f"metrics.cut-{tokens}-{digest[:8]}.jsonl"

    def hf_export(self, step: str) -> Path:
        """Folder of the export of a checkpoint given by name."""
        return self.folder / f"hf-{step}"

    @staticmethod
    def export_record(hf: Path) -> Path:
        """Record of an export, in its folder, so that both appear in one rename."""
        return hf / "export.json"


class Code(TypedDict):
    """Version of the code of a start; empty without git."""

    commit: NotRequired[str]
    dirty: NotRequired[bool]


class Start(TypedDict):
    """A start's entry in the history of config.yaml."""

    time: str
    tokens: Whole
    ranks: Whole
    code: Code
    versions: dict[str, str]
    # old and new value by key
    decisive: NotRequired[dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]]
    operational: NotRequired[dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]]


class RecordedStage(TypedDict):
    """What readers take of a stage."""

    name: str
    mixture: dict[str, Annotated[Finite, Field(ge=0)]]
    tokens: NotRequired[Whole]


class RecordedData(TypedDict):
    """What readers take of the data."""

    stages: NotRequired[list[RecordedStage]]
    block_tokens: NotRequired[Annotated[Whole, Field(gt=0)]]


class RunRecord(TypedDict):
    """What readers take of a run's config.yaml, which has every other setting too."""

    code: NotRequired[Code]
    history: NotRequired[list[Start] | None]
    data: NotRequired[RecordedData]


@dataclass
class Run:
    """Name, folder and seed of a run; everything it writes is in this folder."""

    name: str
    dir: str
    seed: Seed  # of the initial weights
    # weights that a new run starts from, with a fresh optimizer: a transformers folder of a
    # FalconMamba, a checkpoint, or a run's folder; None: random weights
    init_from: str | None = None
    # checkpoint (or run's folder) that a new run continues, with its optimizer and its position
    # in the data: another decay, longer or other later stages
    branch_from: str | None = None
    minutes: Positive | None = None  # time for which experiment=own sizes the run
    # FLOPs that all ranks together are taken to reach; experiment=own
    flops_per_second: Positive | None = None
    # settings that may differ from those of the checkpoint: keys or sections
    accept_changes: list[str] = field(default_factory=list)
    # checkpoint that the commands of eval/ read, by default the newest: a step-N folder, a run's
    # for its newest, or for leaderboards and generation also a Hugging Face folder
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.init_from is not None and self.branch_from is not None:
            raise ValueError(
                "run.init_from loads only weights and run.branch_from a whole checkpoint: set one"
            )

    def check_name(self) -> None:
        """Raise ValueError for a name that a folder, Slurm, W&B or a shell would change.

        Runs that began under another name stay readable: only a start is refused.
        """
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"run.name is {self.name!r}: set a name of at most {NAME_LIMIT} letters, digits "
                "and ._-+=,@ that begins with a letter, a digit or _ (run.dir is its folder)"
            )

    @property
    def folder(self) -> Path:
        return Path(self.dir)

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.folder)


def iter_checkpoints(checkpoints: Path) -> Iterator[Path]:
    """Yield the checkpoint folders, newest first, unverified; other names and files are ignored.

    Raises OSError if the folder exists and cannot be read.
    """
    names = os.listdir(checkpoints) if checkpoints.exists() else []
    paths = [checkpoints / name for name in names if STEP_NAME.fullmatch(name)]
    yield from sorted((path for path in paths if path.is_dir()), key=step_number, reverse=True)


def iter_committed_checkpoints(checkpoints: Path) -> Iterator[Path]:
    """Yield the completely written checkpoints, newest first: those with a manifest."""
    return (path for path in iter_checkpoints(checkpoints) if (path / MANIFEST).is_file())


def step_number(folder: Path) -> int:
    """Step number of a checkpoint folder, from its name."""
    return int(folder.name.removeprefix("step-"))
