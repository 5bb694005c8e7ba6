"""What evaluation and export need to know, torch-free; the values stand in configs/."""

from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from model.config import ModelConfig


@dataclass
class Run:
    """Name, place and seed of a run: everything it writes lies in one folder."""

    name: str
    dir: str
    seed: int  # of the initial weights

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.dir)

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.folder / "checkpoints"

    @property
    def hf(self) -> Path:
        """Where its exported model lies."""
        return self.folder / "hf"


@dataclass
class Sampling:
    """How a token is chosen of its probabilities."""

    temperature: float  # 0 takes the most likely one
    top_k: int  # 0 keeps all
    top_p: float  # 1 keeps all
    seed: int

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("eval.sampling needs temperature >= 0, top_k >= 0 and top_p in (0, 1]")


@dataclass
class Row:
    """One column of a leaderboard: a task or group of lm-evaluation-harness and how its number is made of it."""

    label: str
    task: str
    shots: int
    metrics: list[str]  # "metric,filter" as the harness names them; their mean counts
    floor: float  # score of guessing that is mapped to 0
    floors: dict[str, float]  # idem of single subtasks
    by_size: bool  # subtasks weigh by their documents, else equally

    def __post_init__(self) -> None:
        if self.shots < 0 or not self.metrics:
            raise ValueError(f"eval.suite row {self.label}: shots must not be negative and metrics not empty")
        if not all(0 <= floor < 1 for floor in (self.floor, *self.floors.values())):
            raise ValueError(f"eval.suite row {self.label}: floors must lie in [0, 1)")


@dataclass
class Suite:
    """A leaderboard and what others reached on it, in the order of its rows."""

    name: str
    max_length: int  # tokens of a prompt and its answer
    include: str | None  # folder of further task files
    limit: int | None  # documents of each task at most, for a trial
    rows: list[Row]
    published: dict[str, list[float]]

    def __post_init__(self) -> None:
        if self.max_length < 2 or not self.rows:
            raise ValueError("eval.suite needs max_length >= 2 and at least one row")
        for model, scores in self.published.items():
            if len(scores) != len(self.rows):
                raise ValueError(f"eval.suite.published: {model} has {len(scores)} scores for {len(self.rows)} rows")


@dataclass
class Eval:
    """How much is evaluated, and what is generated."""

    seq_len: int  # context of held-out evaluation
    batch: int  # sequences at once
    max_tokens: int  # held-out tokens read of each source at most
    prompt: str
    new_tokens: int  # generated after the prompt
    sampling: Sampling
    dtype: str  # of the exported weights: float32 or bfloat16
    keep_fp32: list[str]  # parameters exported in fp32 all the same, by their last name: A_log, D, ...
    checkpoint: str | None  # a step-N folder, or for suites also a Hugging Face folder; None is the run's newest
    suite: Suite | None  # a leaderboard instead of held-out text

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"eval.dtype is {self.dtype!r}; choose float32 or bfloat16")
        if min(self.seq_len, self.batch, self.max_tokens, self.new_tokens) < 1:
            raise ValueError("eval.seq_len, batch, max_tokens and new_tokens must be at least 1")


@dataclass
class EvaluationConfig:
    """The sections that eval/export.py and eval/run.py read."""

    run: Run
    model: ModelConfig
    data: DataConfig
    eval: Eval
