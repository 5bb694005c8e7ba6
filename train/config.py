"""Configuration of a run as dataclasses, with the checks between sections. Torch-free.

Values are in configs/, each in one place.
"""

from dataclasses import dataclass, field
from enum import Enum
from math import lcm
from typing import Annotated

from core.old_keys import new_key
from core.ranges import Count, Epsilon, NotNegative, Range, Seconds, Whole
from core.run import Run
from core.schema import ENTRY, config_keys, covers
from data.config import DataConfig
from eval.config import LeaderboardConfig, ValidationConfig
from model.config import Backend, ModelConfig, Recompute
from train.resilience.config import HealthConfig

ROWS_MULTIPLE = 64  # a power of two keeps the head's matmul in whole tiles
LearningRate = Annotated[float, Range(0, 1e3, above=True)]
Beta = Annotated[float, Range(0, 1, below=True)]
Ranks = Annotated[int, Range(1, 2**20)]


class Device(Enum):
    """Device of a rank; `auto` is CUDA where there is a GPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class EngineKind(Enum):
    """Library that reduces gradients and updates weights; train/README.md compares them."""

    deepspeed = "deepspeed"
    megatron = "megatron"


class Precision(Enum):
    """Dtype of matmuls; residual, norms, scan, optimizer and DeepSpeed's weights stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class Optim:
    """AdamW and gradient clipping."""

    lr: LearningRate  # the peak, from the end of the warmup to the start of the decay
    beta1: Beta
    beta2: Beta
    eps: Epsilon
    weight_decay: NotNegative  # on the parameters that model.parameters.has_weight_decay names
    # of the global gradient
    clip_norm: Annotated[float, Range(0, above=True, hint="1e9 disables clipping")]
    # weight of the squared log of the softmax's sum (PaLM, arXiv 2204.02311, section 5); 0: none
    z_loss: NotNegative


class DecayShape(Enum):
    """Decay of the rate from optim.lr to min_lr over the last decay_tokens (train/schedule.py)."""

    exponential = "exponential"
    linear = "linear"
    cosine = "cosine"
    one_minus_sqrt = "one_minus_sqrt"


@dataclass
class ScheduleConfig:
    """Warmup-stable-decay over tokens, with a linear batch ramp."""

    min_lr: LearningRate
    warmup_tokens: Whole
    decay_tokens: Whole  # counted from the end of the last stage
    decay_shape: DecayShape
    batch_start_sequences: Count
    batch_end_sequences: Count
    ramp_tokens: Whole
    # lr ~ sqrt(batch / batch_end_sequences), which keeps Adam's noise temperature constant
    batch_scaling: bool

    def __post_init__(self) -> None:
        if self.batch_start_sequences > self.batch_end_sequences:
            raise ValueError(
                f"schedule.batch_start_sequences {self.batch_start_sequences} exceeds "
                f"schedule.batch_end_sequences {self.batch_end_sequences}: lower it"
            )


@dataclass
class Parallel:
    """Layout of ranks, engine, and micro-batch."""

    tensor_parallel: Ranks
    # shards residual and norms along the sequence over tensor-parallel ranks
    sequence_parallel: bool
    context_parallel: Ranks  # ranks that share a sequence, each with one chunk
    engine: EngineKind
    # 0 shards nothing over replicas, 1 the optimizer's state, 2 also gradients, 3 also parameters
    zero_stage: Annotated[int, Range(0, 3)]
    # tokens of one forward; sequences per micro-batch follow from the stage's seq_len
    micro_batch_tokens: Count
    bucket_elements: Count

    def __post_init__(self) -> None:
        if self.engine is EngineKind.megatron and self.zero_stage != 1:
            raise ValueError(
                f"parallel.engine=megatron needs parallel.zero_stage=1, not {self.zero_stage}: set "
                "parallel.engine=deepspeed for the other stages"
            )


@dataclass
class Compute:
    """Precision, recompute and kernels of a rank."""

    precision: Precision
    recompute: Recompute
    kernels: Backend
    compile: bool  # torch.compile of every block, around the kernels

    def check_compile(self, parallel: Parallel) -> None:
        """Raise ValueError where blocks have collectives, which torch.compile cannot take."""
        is_parallel = parallel.tensor_parallel > 1 or parallel.context_parallel > 1
        if self.compile and (is_parallel or parallel.zero_stage == 3):
            raise ValueError(
                "compute.compile needs blocks without collectives: parallel.tensor_parallel=1, "
                "context_parallel=1, zero_stage<3"
            )


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every_tokens: Count
    keep_last: Count
    # keep the first one past each multiple forever; None keeps none
    keep_every_tokens: Count | None
    keep_stage_ends: bool
    retry_seconds: Seconds  # pause after a failed save; doubles with every further failure
    max_failures: Count  # failed saves in a row that stop the run

    def __post_init__(self) -> None:
        if self.keep_every_tokens is not None and self.keep_every_tokens < self.every_tokens:
            raise ValueError(
                "checkpoint.keep_every_tokens must not be below checkpoint.every_tokens (null "
                "keeps none)"
            )


@dataclass
class MetricsConfig:
    """Outputs of metrics besides metrics.jsonl."""

    wandb_project: str | None  # None: no W&B run
    tensorboard: bool  # into the run's folder; needs the package tensorboard
    console_seconds: Seconds  # minimum time between lines of a plain console
    trackers: list[str] = field(default_factory=list)  # others: train/metrics/trackers.py
    wandb_entity: str | None = None  # None: the default of the user's key
    wandb_group: str | None = None  # of runs that W&B shows together
    wandb_tags: list[str] = field(default_factory=list)  # of the W&B run


@dataclass
class ProfileConfig:
    """Profile of a few steps: a table by phase, a trace for Perfetto or chrome://tracing."""

    steps: Whole  # traced; 0 profiles none
    after_steps: Whole  # of this start, before the profile
    # for the table, before the traced ones, since tracing slows a step
    timed_steps: Whole
    ranks: list[Whole]  # profiled

    def __post_init__(self) -> None:
        if self.steps and not self.ranks:
            raise ValueError(
                "train.profile.ranks is empty: name ranks or set train.profile.steps=0"
            )


@dataclass
class Train:
    """Options of the training loop."""

    profile: ProfileConfig


@dataclass
class Cluster:
    """Machines that a run is planned for; a started run has the launcher's ranks."""

    device: Device
    nodes: Annotated[int, Range(1, 2**17)]
    ranks_per_node: Annotated[int, Range(1, 1024)]
    memory_gib: Annotated[float, Range(1e-3, 1e6)] | None  # of one rank's device; None: measured
    # part of it that is reserved for CUDA, NCCL and fragmentation; none on a CPU
    headroom_gib: Annotated[float, Range(0, 1e6)]
    # dense, of one rank, in the run's precision; None takes the datasheet of a known GPU in bf16,
    # and shows no MFU on other devices
    peak_tflops: Annotated[float, Range(1e-6, 1e6)] | None


@dataclass
class RunConfig:
    """Configuration of a run."""

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
        self.run.check_name()
        self._check_accepted_keys()
        if self.schedule.min_lr > self.optim.lr:
            raise ValueError(
                f"schedule.min_lr {self.schedule.min_lr:g} exceeds the peak optim.lr "
                f"{self.optim.lr:g}: lower schedule.min_lr or raise optim.lr"
            )
        # not rounded to blocks: a run that is all decay decays over the tokens of its stage
        tokens = sum(stage.tokens for stage in self.data.stages)
        if self.schedule.decay_tokens > tokens:
            raise ValueError(
                f"schedule.decay_tokens {self.schedule.decay_tokens} exceeds the stages' "
                f"{tokens} tokens: lower it or make a stage longer"
            )
        if self.data.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size {self.data.tokenizer.vocab_size} exceeds "
                f"model.vocab_size {self.model.vocab_size}: some ids would have no embedding; set "
                f"model.vocab_size={self._embedding_rows()}"
            )
        self.compute.check_compile(self.parallel)
        self.model.check_tensor_parallel(self.parallel.tensor_parallel)
        for stage in self.data.stages:
            chunk, remainder = divmod(stage.seq_len, self.parallel.context_parallel)
            if remainder or chunk < self.model.d_conv - 1:
                raise ValueError(
                    f"parallel.context_parallel {self.parallel.context_parallel} cannot split "
                    f"the {stage.seq_len} tokens of stage {stage.name}: it must divide them into "
                    f"chunks of at least {self.model.d_conv - 1}"
                )
        if self.parallel.sequence_parallel:
            self._check_sequence_parallel()
        max_seq_len = max(stage.seq_len for stage in self.data.stages)
        if self.parallel.micro_batch_tokens < max_seq_len:
            raise ValueError(
                f"parallel.micro_batch_tokens {self.parallel.micro_batch_tokens} is below the "
                f"longest sequence ({max_seq_len} tokens): raise it"
            )

    def _check_accepted_keys(self) -> None:
        self.run.accept_changes = [new_key(key) for key in self.run.accept_changes]
        known = [key.partition(f".{ENTRY}")[0] for key in config_keys(RunConfig)]
        for key in self.run.accept_changes:
            if not any(covers((key,), other) or covers((other,), key) for other in known):
                raise ValueError(
                    f"run.accept_changes names {key}, which is no setting of a run: name keys such "
                    "as optim.lr, or sections such as data.stages"
                )

    def _check_sequence_parallel(self) -> None:
        tp_size = self.parallel.tensor_parallel
        if tp_size == 1:
            raise ValueError(
                "parallel.sequence_parallel shards over tensor-parallel ranks: set "
                "parallel.tensor_parallel above 1"
            )
        lengths = {
            f"stage {s.name}": s.seq_len // self.parallel.context_parallel for s in self.data.stages
        }
        lengths["validation"] = self.validation.seq_len
        for name, length in lengths.items():
            if length % tp_size:
                raise ValueError(
                    f"parallel.sequence_parallel: {tp_size} tensor-parallel ranks do not divide "
                    f"the {length} tokens of a sequence of {name}"
                )

    def _embedding_rows(self) -> int:
        """Rows for the tokenizer's ids that tensor-parallel ranks and matmul tiles divide."""
        multiple = lcm(ROWS_MULTIPLE, self.parallel.tensor_parallel)
        return -(-self.data.tokenizer.vocab_size // multiple) * multiple

    @property
    def tokens(self) -> int:
        """Tokens of the run: whole blocks of every stage."""
        return sum(self.data.tokens_of(stage) for stage in self.data.stages)
