"""Config sections of evaluation and export; torch-free. configs/ holds the values."""

from dataclasses import dataclass
from enum import Enum

from core.run import Run
from data.config import DataConfig
from model.config import ModelConfig, Sampling


@dataclass
class ValidationConfig:
    """Held-out loss during training."""

    every_tokens: int
    tokens: int  # per source, from the start of its held-out split
    seq_len: int
    batch_sequences: int  # per forward

    def __post_init__(self) -> None:
        if min(self.every_tokens, self.tokens, self.seq_len, self.batch_sequences) < 1:
            raise ValueError(
                "validation.every_tokens, tokens, seq_len and batch_sequences must be at least 1"
            )


class Launcher(Enum):
    """How to start an evaluation job."""

    local = "local"
    slurm = "slurm"


@dataclass
class JobsConfig:
    """Leaderboard jobs on saved checkpoints during a run."""

    suites: list[str]  # choices of configs/suite
    every_tokens: int
    launcher: Launcher
    sbatch_options: list[str]  # extra options of sbatch
    overrides: list[str]  # extra overrides of eval/run.py

    def __post_init__(self) -> None:
        if self.every_tokens < 1:
            raise ValueError("leaderboard.jobs.every_tokens must be at least 1")


@dataclass
class SuiteRow:
    """A score of a suite: a task or group of lm-evaluation-harness and how to score it."""

    label: str
    task: str
    shots: int
    metrics: list[str]  # "metric,filter" as the harness names them; the score is their mean
    floor: float  # score of random guessing, rescaled to 0
    floors: dict[str, float]  # floors of subtasks that differ from `floor`
    by_size: bool  # weight subtasks by their number of documents, else equally

    def __post_init__(self) -> None:
        if self.shots < 0 or not self.metrics:
            raise ValueError(
                f"leaderboard.suite row {self.label}: shots must be >= 0 and metrics not empty"
            )
        if any(metric.startswith("exact_match_original") for metric in self.metrics):
            raise ValueError(
                f"leaderboard.suite row {self.label}: use exact_match. exact_match_original needs "
                "antlr4 4.11, which conflicts with hydra, and without antlr4 it rejects correct "
                "answers in another form"
            )
        if not all(0 <= floor < 1 for floor in (self.floor, *self.floors.values())):
            raise ValueError(f"leaderboard.suite row {self.label}: floors must be in [0, 1)")


@dataclass
class Suite:
    """A leaderboard, and published scores in the order of its rows."""

    name: str
    max_length_tokens: int  # prompt and answer together
    include: str | None  # folder of extra task files
    limit_documents: int | None  # max documents per task, for a trial
    rows: list[SuiteRow]
    published: dict[str, list[float]]

    def __post_init__(self) -> None:
        if self.max_length_tokens < 2 or not self.rows:
            raise ValueError(
                "leaderboard.suite needs max_length_tokens >= 2 and rows with at least one row"
            )
        if self.limit_documents is not None and self.limit_documents < 1:
            raise ValueError("leaderboard.suite.limit_documents must be at least 1, or null")
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
    batch_tokens: int = 8192  # per forward; runs before 0.2 have no such key in config.yaml

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError("leaderboard.batch_tokens must be at least 1")


@dataclass
class EvalConfig:
    """How much held-out text eval/run.py reads."""

    seq_len: int  # tokens per window
    batch_sequences: int  # per forward
    max_tokens: int  # per source

    def __post_init__(self) -> None:
        if min(self.seq_len, self.batch_sequences, self.max_tokens) < 1:
            raise ValueError("eval.seq_len, batch_sequences and max_tokens must be at least 1")


@dataclass
class GenerateConfig:
    """Sampling of eval/run.py and eval/generate.py."""

    prompt: str
    new_tokens: int  # max tokens after the prompt
    sampling: Sampling

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ValueError("generate.new_tokens must be at least 1")


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
