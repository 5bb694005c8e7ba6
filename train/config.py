"""The whole configuration of a run as dataclasses: types, and the checks between sections.
Torch-free.

The values stand in configs/, each in one place.
"""

from dataclasses import dataclass, field
from enum import Enum

from core.run import Run
from data.config import DataConfig
from eval.config import LeaderboardConfig, ValidationConfig
from model.config import Backend, ModelConfig, Recompute
from train.resilience.config import HealthConfig


class Device(Enum):
    """Where a rank computes; `auto` is CUDA when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class EngineKind(Enum):
    """Who reduces gradients and updates weights; what each can do stands in train/README.md."""

    deepspeed = "deepspeed"
    megatron = "megatron"


class Precision(Enum):
    """Type of matrix products; residual, norms, scan, optimizer, DeepSpeed's weights stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class Optim:
    """AdamW and the clipping of its gradient."""

    lr: float  # its peak, after the warmup and until the decay
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # on matrices; the rule by name is model.parameters.decays
    clip_norm: float  # of the global gradient
    # weight of the squared log of the softmax's sum (PaLM, arXiv 2204.02311, section 5); 0 is none
    z_loss: float

    def __post_init__(self) -> None:
        if self.clip_norm <= 0:
            raise ValueError(
                f"optim.clip_norm is {self.clip_norm}; it must be positive (1e9 switches "
                "clipping off)"
            )
        if not (
            0 <= self.beta1 < 1
            and 0 <= self.beta2 < 1
            and min(self.lr, self.eps) > 0 <= min(self.weight_decay, self.z_loss)
        ):
            raise ValueError(
                "optim needs lr > 0, beta1 and beta2 in [0, 1), eps > 0, weight_decay >= 0, "
                "z_loss >= 0"
            )


class DecayShape(Enum):
    """How the rate falls from optim.lr to min_lr in the last decay_tokens (train/schedule.py)."""

    exponential = "exponential"
    linear = "linear"
    cosine = "cosine"
    one_minus_sqrt = "one_minus_sqrt"


@dataclass
class ScheduleConfig:
    """Warmup-stable-decay over tokens, with a linear batch ramp."""

    min_lr: float
    warmup_tokens: int
    decay_tokens: int  # counted from the end of the last stage
    decay_shape: DecayShape
    batch_start_sequences: int
    batch_end_sequences: int
    ramp_tokens: int
    # lr ~ sqrt(batch / batch_end_sequences), which keeps Adam's noise temperature constant
    batch_scaling: bool

    def __post_init__(self) -> None:
        if self.min_lr <= 0:
            raise ValueError(f"schedule.min_lr is {self.min_lr}; it must be positive")
        if not 1 <= self.batch_start_sequences <= self.batch_end_sequences:
            raise ValueError("schedule needs 1 <= batch_start_sequences <= batch_end_sequences")
        if min(self.warmup_tokens, self.decay_tokens, self.ramp_tokens) < 0:
            raise ValueError(
                "schedule.warmup_tokens, decay_tokens and ramp_tokens must not be negative"
            )


@dataclass
class Parallel:
    """How one step is spread over ranks and memory."""

    tensor_parallel: int
    sequence_parallel: bool  # under tensor parallelism, residual and norms cut along the sequence
    context_parallel: int  # ranks that a sequence is split over
    engine: EngineKind
    # 1 cuts the optimizer's state over replicas, 2 gradients too, 3 parameters too; 0 nothing
    zero_stage: int
    # of one forward; sequences per micro-batch follow from the stage's seq_len
    micro_batch_tokens: int
    bucket_elements: int

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"parallel.zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        if self.engine is EngineKind.megatron and self.zero_stage != 1:
            raise ValueError(
                "parallel.engine=megatron supports only ZeRO stage 1, and parallel.zero_stage is "
                f"{self.zero_stage}: set parallel.engine=deepspeed for the other stages"
            )
        sizes = (self.tensor_parallel, self.context_parallel, self.micro_batch_tokens)
        if min(*sizes, self.bucket_elements) < 1:
            raise ValueError(
                "parallel.tensor_parallel, context_parallel, micro_batch_tokens and "
                "bucket_elements must be at least 1"
            )


@dataclass
class Compute:
    """How one rank computes a step."""

    precision: Precision
    recompute: Recompute
    kernels: Backend
    compile: bool  # blocks by torch.compile, around the kernels

    def check_compile(self, parallel: Parallel) -> None:
        """Raise ValueError where torch.compile would meet collectives inside a block."""
        cut = parallel.tensor_parallel > 1 or parallel.context_parallel > 1
        if self.compile and (cut or parallel.zero_stage == 3):
            raise ValueError(
                "compute.compile takes whole blocks, without collectives inside: "
                "parallel.tensor_parallel and context_parallel must be 1, and zero_stage below 3"
            )


@dataclass
class CheckpointConfig:
    """When the training state is saved, and which states are kept."""

    every_tokens: int
    keep_last: int
    # keeps the first one past each multiple for good; None keeps none
    keep_every_tokens: int | None
    keep_stage_ends: bool
    retry_seconds: float  # pause after a save that failed; doubles with each further one
    max_failures: int  # saves in a row that failed, after which the run stops

    def __post_init__(self) -> None:
        if min(self.every_tokens, self.keep_last, self.max_failures) < 1 or self.retry_seconds < 0:
            raise ValueError(
                "checkpoint.every_tokens, keep_last and max_failures must be at least 1, "
                "retry_seconds not negative"
            )
        if self.keep_every_tokens is not None and self.keep_every_tokens < self.every_tokens:
            raise ValueError(
                "checkpoint.keep_every_tokens must not be below checkpoint.every_tokens; null "
                "keeps none"
            )


@dataclass
class MetricsConfig:
    """Where numbers go besides metrics.jsonl."""

    wandb_project: str | None  # None writes no W&B run
    tensorboard: bool  # into the run's folder; needs the package of that name
    console_seconds: float  # a plain console shows a line at most this often
    trackers: list[str] = field(default_factory=list)  # others: train/metrics/trackers.py


@dataclass
class ProfileConfig:
    """Profile a few steps: a table of time by phase, a trace for Perfetto or chrome://tracing."""

    steps: int  # that are traced; 0 looks at none
    after_steps: int  # steps of this start that come before
    # between these and the traced ones: the table's, for a trace slows what it sees
    timed_steps: int
    ranks: list[int]  # that are looked at

    def __post_init__(self) -> None:
        if min(self.steps, self.after_steps, self.timed_steps, *self.ranks, 0) < 0:
            raise ValueError(
                "train.profile.steps, after_steps, timed_steps and ranks must not be negative"
            )
        if self.steps and not self.ranks:
            raise ValueError("train.profile.ranks is empty: train.profile.steps=0 looks at no step")


@dataclass
class Train:
    """What the loop does besides training."""

    profile: ProfileConfig


@dataclass
class Cluster:
    """The machines a run is planned for; at run time the launcher's ranks count."""

    device: Device
    nodes: int
    ranks_per_node: int
    memory_gib: float | None  # of one rank's device; None asks the machine
    # of it, that a run leaves to CUDA, NCCL and gaps of the allocator; none on a CPU
    headroom_gib: float
    # dense, of one rank, in the run's precision; None measures a matrix product
    peak_tflops: float | None


@dataclass
class RunConfig:
    """One run."""

    run: Run
    model: ModelConfig
    data: DataConfig
    optim: Optim
    schedule: ScheduleConfig
    parallel: Parallel
    compute: Compute
    checkpoint: CheckpointConfig
    health: HealthConfig
    metrics: MetricsConfig
    train: Train
    cluster: Cluster
    validation: ValidationConfig
    leaderboard: LeaderboardConfig

    def __post_init__(self) -> None:
        tokens = self.tokens
        if self.schedule.min_lr > self.optim.lr:
            raise ValueError(
                f"schedule.min_lr {self.schedule.min_lr:g}, where the decay ends, exceeds the "
                f"peak optim.lr {self.optim.lr:g}: lower one or raise the other"
            )
        if self.schedule.decay_tokens > tokens:
            raise ValueError(
                f"schedule.decay_tokens {self.schedule.decay_tokens} exceeds the stages' "
                f"{tokens} tokens"
            )
        if self.data.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size {self.data.tokenizer.vocab_size} exceeds "
                f"model.vocab_size {self.model.vocab_size}: some ids would have no embedding"
            )
        self.compute.check_compile(self.parallel)
        self.model.check_tensor_parallel(self.parallel.tensor_parallel)
        for stage in self.data.stages:
            piece, rest = divmod(stage.seq_len, self.parallel.context_parallel)
            if rest or piece < self.model.d_conv - 1:
                raise ValueError(
                    f"parallel.context_parallel {self.parallel.context_parallel} cannot split "
                    f"the {stage.seq_len} tokens of a sequence of stage {stage.name}: it must "
                    f"divide them and leave each rank at least {self.model.d_conv - 1}"
                )
        if self.parallel.sequence_parallel:
            self._check_sequence_parallel()
        longest = max(stage.seq_len for stage in self.data.stages)
        if self.parallel.micro_batch_tokens < longest:
            raise ValueError(
                f"parallel.micro_batch_tokens {self.parallel.micro_batch_tokens} does not hold "
                f"one sequence of the longest stage ({longest} tokens)"
            )

    def _check_sequence_parallel(self) -> None:
        tp = self.parallel.tensor_parallel
        if tp == 1:
            raise ValueError(
                "parallel.sequence_parallel cuts over tensor-parallel ranks: set "
                "parallel.tensor_parallel"
            )
        pieces = {
            f"stage {s.name}": s.seq_len // self.parallel.context_parallel for s in self.data.stages
        }
        for what, length in {**pieces, "validation": self.validation.seq_len}.items():
            if length % tp:
                raise ValueError(
                    f"parallel.sequence_parallel: {tp} tensor-parallel ranks do not divide the "
                    f"{length} tokens of a sequence of {what}"
                )

    @property
    def tokens(self) -> int:
        """Tokens of the whole run: every stage in whole blocks."""
        return sum(self.data.tokens_of(stage) for stage in self.data.stages)
