"""Model configuration, torch-free; values are in configs/model."""

from dataclasses import dataclass
from enum import Enum

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

    vocab_size: int
    d_model: int
    n_layer: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    norm_eps: float  # block and final RMSNorm
    mixer_norm_eps: float  # of the weightless RMSNorms of dt, B and C
    mixer_norms: bool  # False is plain Mamba-1
    embedding_std: float
    dt_min: float  # initial time steps are log-uniform in [dt_min, dt_max], at least dt_floor
    dt_max: float
    dt_floor: float

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layer", "d_inner", "d_state", "d_conv", "dt_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if min(self.norm_eps, self.mixer_norm_eps) <= 0 or self.embedding_std < 0:
            raise ValueError("model needs norm_eps > 0, mixer_norm_eps > 0 and embedding_std >= 0")
        if not 0 < self.dt_floor <= self.dt_min <= self.dt_max:
            raise ValueError("model needs 0 < dt_floor <= dt_min <= dt_max")

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

    temperature: float  # 0: greedy
    top_k: int  # 0: all
    top_p: float  # 1: all
    seed: int

    def __post_init__(self) -> None:
        if min(self.temperature, self.top_k, self.seed) < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "generate.sampling needs temperature, top_k and seed >= 0, and top_p in (0, 1]"
            )
