"""Model configuration, torch-free; values are in configs/model."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, get_type_hints

from core.ranges import Epsilon, NotNegative, Positive, Range, Seed, Whole, range_of

Size = Annotated[int, Range(1, 2**32)]
DERIVED = 0  # stands for a size that follows from d_model

SCAN_CHUNK = 16  # a fused scan saves its state every SCAN_CHUNK tokens for the backward
LOSS_CHUNK = 1024  # minimum number of tokens per chunk of logits; see loss_chunk


class Backend(Enum):
    """Kernel backends; `auto` takes the fastest available one."""

    auto = "auto"
    reference = "reference"
    cpu = "cpu"  # C++
    cuda = "cuda"  # ours
    mamba_ssm = "mamba_ssm"  # the public CUDA kernels


class Recompute(Enum):
    """What the backward recomputes instead of saving."""

    none = "none"
    # from in_proj's output to out_proj's input: convolution, x_proj, dt_proj and scan
    selective = "selective"
    full = "full"  # whole blocks; only the residual stream is saved


def loss_chunk(tokens: int, d_model: int) -> int:
    """Number of tokens per chunk of logits: equal chunks of at most max(LOSS_CHUNK, d_model).

    Every chunk also accumulates into lm_head's gradient [v, d_model]: chunks of d_model tokens have
    logits of the same size.
    """
    chunks = max(1, -(-tokens // max(LOSS_CHUNK, d_model)))
    return max(1, -(-tokens // chunks))


@dataclass
class ModelConfig:
    """Sizes named as in Mamba (arXiv 2312.00752) and Falcon Mamba (arXiv 2410.05355, table 1).

    The defaults are those of Falcon Mamba 7B, for Python; configs/model/7b.yaml has the same, with
    their sources. Raises ValueError for a number out of its range.
    """

    vocab_size: Size = 65024
    d_model: Size = 4096
    n_layer: Size = 64
    d_inner: Size = DERIVED  # twice d_model
    d_state: Size = 16
    d_conv: Size = 4
    dt_rank: Size = DERIVED  # a sixteenth of d_model, rounded up
    norm_eps: Epsilon = 1e-5  # block and final RMSNorm
    mixer_norm_eps: Epsilon = 1e-6  # of the weightless RMSNorms of dt, B and C
    mixer_norms: bool = True  # False is plain Mamba-1
    embedding_std: NotNegative = 0.02
    # initial time steps are log-uniform in [dt_min, dt_max], at least dt_floor
    dt_min: Positive = 0.001
    dt_max: Positive = 0.1
    dt_floor: Positive = 1e-4

    def __post_init__(self) -> None:
        if self.d_inner == DERIVED:
            self.d_inner = 2 * self.d_model
        if self.dt_rank == DERIVED:
            self.dt_rank = -(-self.d_model // 16)
        for name, hint in get_type_hints(ModelConfig, include_extras=True).items():
            limits = range_of(hint)
            if limits is None:
                continue
            if problem := limits.problem(getattr(self, name), hint.__origin__):
                raise ValueError(f"model.{name} {problem}")
        if not self.dt_floor <= self.dt_min <= self.dt_max:
            raise ValueError(
                f"model.dt_floor {self.dt_floor:g}, dt_min {self.dt_min:g} and dt_max "
                f"{self.dt_max:g} must not decrease in this order"
            )

    def check_tensor_parallel(self, ranks: int) -> None:
        """Raise ValueError unless `ranks` divides every sharded dimension."""
        for name in ("d_inner", "vocab_size"):
            size = getattr(self, name)
            if size % ranks:
                raise ValueError(
                    f"parallel.tensor_parallel {ranks} does not divide model.{name} {size}: set "
                    f"model.{name}={-(-size // ranks) * ranks}, or another tensor_parallel"
                )


@dataclass
class Sampling:
    """How the next token is sampled."""

    temperature: NotNegative  # 0: greedy
    top_k: Whole  # 0: all
    top_p: Annotated[float, Range(0, 1, above=True)]  # 1: all
    seed: Seed
