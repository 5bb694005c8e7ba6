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
class Eval:
    """How much is evaluated, and what is generated."""

    seq_len: int  # context of held-out evaluation
    batch: int  # sequences at once
    max_tokens: int  # held-out tokens read of each source at most
    prompt: str
    new_tokens: int  # generated after the prompt
    dtype: str  # of the exported weights: float32 or bfloat16
    keep_fp32: list[str]  # parameters exported in fp32 all the same, by their last name: A_log, D, ...
    checkpoint: str | None  # a step-N folder, or for suites also a Hugging Face folder; None is the run's newest

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
