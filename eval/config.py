"""What evaluation and export need to know, torch-free; the values stand in configs/."""

from dataclasses import dataclass
from enum import Enum

from core.run import Run
from data.config import DataConfig
from model.config import ModelConfig, Sampling


@dataclass
class ValidationConfig:
    """Held-out loss during training."""

    every_tokens: int
    tokens: int  # of each source, its first held-out ones
    seq_len: int
    batch_sequences: int  # of a forward

    def __post_init__(self) -> None:
        if min(self.every_tokens, self.tokens, self.seq_len, self.batch_sequences) < 1:
            raise ValueError(
                "validation.every_tokens, tokens, seq_len and batch_sequences must be at least 1"
            )


class Launcher(Enum):
    """How an evaluation job is started."""

    local = "local"
    slurm = "slurm"


@dataclass
class Jobs:
    """Leaderboards on saved checkpoints while the run goes on."""

    suites: list[str]  # choices of configs/suite
    every_tokens: int
    launcher: Launcher
    sbatch: list[str]  # further options of sbatch
    overrides: list[str]  # of eval/run.py

    def __post_init__(self) -> None:
        if self.every_tokens < 1:
            raise ValueError("leaderboard.jobs.every_tokens must be at least 1")


@dataclass
class Row:
    """Leaderboard column: a task or group of lm-evaluation-harness and how it is scored."""

    label: str
    task: str
    shots: int
    metrics: list[str]  # "metric,filter" as the harness names them; their mean counts
    floor: float  # score of guessing that is mapped to 0
    floors: dict[str, float]  # idem of single subtasks
    by_size: bool  # subtasks weigh by their documents, else equally

    def __post_init__(self) -> None:
        if self.shots < 0 or not self.metrics:
            raise ValueError(
                f"leaderboard.suite row {self.label}: shots must not be "
                "negative and metrics not empty"
            )
        if any(metric.startswith("exact_match_original") for metric in self.metrics):
            raise ValueError(
                f"leaderboard.suite row {self.label}: exact_match_original needs antlr4 4.11, "
                "which hydra excludes; without it, equal answers of another form count as wrong: "
                "take exact_match"
            )
        if not all(0 <= floor < 1 for floor in (self.floor, *self.floors.values())):
            raise ValueError(f"leaderboard.suite row {self.label}: floors must lie in [0, 1)")


@dataclass
class Suite:
    """A leaderboard and what others reached on it, in the order of its rows."""

    name: str
    max_length_tokens: int  # tokens of a prompt and its answer
    include: str | None  # folder of further task files
    limit_documents: int | None  # documents of each task at most, for a trial
    rows: list[Row]
    published: dict[str, list[float]]

    def __post_init__(self) -> None:
        if self.max_length_tokens < 2 or not self.rows:
            raise ValueError("leaderboard.suite needs max_length_tokens >= 2 and at least one row")
        for model, scores in self.published.items():
            if len(scores) != len(self.rows):
                raise ValueError(
                    f"leaderboard.suite.published: {model} has {len(scores)} scores for "
                    f"{len(self.rows)} rows"
                )


@dataclass
class LeaderboardConfig:
    """Which leaderboard eval/run.py runs, and which ones a run starts on its checkpoints."""

    suite: Suite | None  # instead of held-out text
    jobs: Jobs
    batch_tokens: int = 8192  # of a forward; a default for the config.yaml of runs before 0.2

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError("leaderboard.batch_tokens must be at least 1")


@dataclass
class EvalConfig:
    """How much held-out text eval/run.py reads."""

    seq_len: int  # context
    batch_sequences: int  # of a forward
    max_tokens: int  # of each source at most

    def __post_init__(self) -> None:
        if min(self.seq_len, self.batch_sequences, self.max_tokens) < 1:
            raise ValueError("eval.seq_len, batch_sequences and max_tokens must be at least 1")


@dataclass
class GenerateConfig:
    """The sample that eval/run.py and eval/generate.py write."""

    prompt: str
    new_tokens: int  # after the prompt at most
    sampling: Sampling

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ValueError("generate.new_tokens must be at least 1")


@dataclass
class ExportConfig:
    """How weights are exported and where they are published."""

    dtype: str  # of the weights: float32 or bfloat16
    keep_fp32: list[str]  # parameters in fp32 all the same, by their last name: A_log, D, ...
    hub: str | None  # USER/MODEL that eval/push.py uploads to

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"export.dtype is {self.dtype!r}; choose float32 or bfloat16")


@dataclass
class EvaluationConfig:
    """The sections that the commands of eval/ read."""

    run: Run
    model: ModelConfig
    data: DataConfig
    validation: ValidationConfig
    eval: EvalConfig
    generate: GenerateConfig
    export: ExportConfig
    leaderboard: LeaderboardConfig
