"""Config section `health`: limits for failing steps, ranks and starts. Torch-free."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from core.ranges import Count, PositiveOrInf, PositiveSeconds, Range, Seconds, Whole


class VerifyShards(Enum):
    """When shards are hashed; their sizes are checked at every start."""

    before = "before"  # before training
    background = "background"  # during training, which stops at the first bad shard
    never = "never"


@dataclass
class HealthConfig:
    """Limits for failing steps, ranks and starts; docs/design/faults.md lists the failures."""

    max_skipped_updates: Count  # consecutive skipped updates before the run stops
    spike_window_updates: Count  # number of past losses that define a spike
    spike_sigmas: PositiveOrInf  # a loss this many standard deviations above their mean is a spike
    spike_patience_updates: Count  # consecutive spikes before the run rolls back to a checkpoint
    # rollbacks before the run stops; a whole window of updates resets the count
    max_rollbacks: Whole
    check_replicas_every_steps: Count
    straggler_window_steps: Count
    # times slower than the other ranks
    straggler_factor: Annotated[float, Range(1, above=True, infinite=True)]
    # without progress of a rank; six times that at the start, in validation, for a sync of a save
    hang_seconds: PositiveSeconds
    max_starts: Count  # from the same position without a new checkpoint
    # save and exit with code 75 after this time; Slurm's job end is always respected
    stop_after_seconds: PositiveSeconds | None
    stop_margin_seconds: Seconds  # before the end of the Slurm job
    verify_shards: VerifyShards

    def __post_init__(self) -> None:
        if self.spike_patience_updates > self.max_skipped_updates:
            raise ValueError(
                "health.spike_patience_updates must not exceed health.max_skipped_updates: the "
                "run would stop before"
            )
