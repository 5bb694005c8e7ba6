"""Model configuration, torch-free; values are in configs/model."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from core.ranges import Epsilon, NotNegative, Positive, Range, Seed, Whole

Size = Annotated[int, Range(1, 2**32)]

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
    """Sizes named as in Mamba (arXiv 2312.00752) and Falcon Mamba (arXiv 2410.05355, table 1)."""

    vocab_size: Size
    d_model: Size
    n_layer: Size
    d_inner: Size
    d_state: Size
    d_conv: Size
    dt_rank: Size
    norm_eps: Epsilon  # block and final RMSNorm
    mixer_norm_eps: Epsilon  # of the weightless RMSNorms of dt, B and C
    mixer_norms: bool  # False is plain Mamba-1
    embedding_std: NotNegative
    dt_min: Positive  # initial time steps are log-uniform in [dt_min, dt_max], at least dt_floor
    dt_max: Positive
    dt_floor: Positive

    def __post_init__(self) -> None:
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
