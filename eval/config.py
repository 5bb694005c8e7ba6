"""Config sections of evaluation and export; torch-free. configs/ holds the values."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from core.ranges import Count, Range, Whole
from core.run import Run
from data.config import DataConfig
from model.config import ModelConfig, Sampling

Floor = Annotated[float, Range(0, 1, below=True)]
Percent = Annotated[float, Range(0, 100)]


@dataclass
class ValidationConfig:
    """Held-out loss during training."""

    every_tokens: Count
    tokens: Count  # per source, from the start of its held-out split
    seq_len: Count
    batch_sequences: Count  # per forward


class Launcher(Enum):
    """How to start an evaluation job."""

    local = "local"
    slurm = "slurm"


@dataclass
class JobsConfig:
    """Leaderboard jobs on saved checkpoints during a run."""

    suites: list[str]  # choices of configs/suite
    every_tokens: Count
    launcher: Launcher
    sbatch_options: list[str]  # extra options of sbatch
    overrides: list[str]  # extra overrides of eval/run.py


@dataclass
class SuiteRow:
    """A score of a suite: a task or group of lm-evaluation-harness and how to score it."""

    label: str
    task: str
    shots: Whole
    metrics: list[str]  # "metric,filter" as the harness names them; the score is their mean
    floor: Floor  # score of random guessing, rescaled to 0
    floors: dict[str, Floor]  # floors of subtasks that differ from `floor`
    by_size: bool  # weight subtasks by their number of documents, else equally

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError(f"leaderboard.suite row {self.label}: metrics is empty, name one")
        if any(metric.startswith("exact_match_original") for metric in self.metrics):
            raise ValueError(
                f"leaderboard.suite row {self.label}: use exact_match. exact_match_original needs "
                "antlr4 4.11, which conflicts with hydra, and without antlr4 it rejects correct "
                "answers in another form"
            )


@dataclass
class Suite:
    """A leaderboard, and published scores in the order of its rows."""

    name: str
    max_length_tokens: Annotated[int, Range(2)]  # prompt and answer together
    include: str | None  # folder of extra task files
    limit_documents: Count | None  # max documents per task, for a trial
    rows: list[SuiteRow]
    published: dict[str, list[Percent]]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("leaderboard.suite.rows is empty: a suite needs at least one row")
        for model, scores in self.published.items():
            if len(scores) != len(self.rows):
                raise ValueError(
                    f"leaderboard.suite.published: {model} has {len(scores)} scores for "
                    f"{len(self.rows)} rows"
                )


@dataclass
class LeaderboardConfig:
    """The suite that eval/run.py runs, and the jobs that a run starts on its checkpoints."""

    suite: Suite | None  # None: eval/run.py scores held-out text
    jobs: JobsConfig
    batch_tokens: Count = 8192  # per forward; runs before 0.2 have no such key in config.yaml


@dataclass
class EvalConfig:
    """How much held-out text eval/run.py reads."""

    seq_len: Count  # tokens per window
    batch_sequences: Count  # per forward
    max_tokens: Count  # per source


@dataclass
class GenerateConfig:
    """Sampling of eval/run.py and eval/generate.py."""

    prompt: str
    new_tokens: Count  # max tokens after the prompt
    sampling: Sampling


@dataclass
class ExportConfig:
    """Dtypes of exported weights, and the hub repository."""

    dtype: str  # float32 or bfloat16
    keep_fp32: list[str]  # last names of parameters to export in fp32: A_log, D, ...
    hub: str | None  # USER/MODEL to upload to with eval/push.py

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"export.dtype is {self.dtype!r}; choose float32 or bfloat16")


@dataclass
class EvaluationConfig:
    """Config sections that the commands of eval/ read."""

    run: Run
    model: ModelConfig
    data: DataConfig
    validation: ValidationConfig
    eval: EvalConfig
    generate: GenerateConfig
    export: ExportConfig
    leaderboard: LeaderboardConfig
