"""Config section `health`: limits for failing steps, ranks and starts. Torch-free."""

from dataclasses import dataclass
from enum import Enum


class VerifyShards(Enum):
    """When shards are hashed; their sizes are checked at every start."""

    before = "before"  # before training
    background = "background"  # during training, which stops at the first bad shard
    never = "never"


@dataclass
class HealthConfig:
    """Limits for failing steps, ranks and starts; train/README.md lists the failures."""

    max_skipped_updates: int  # consecutive skipped updates before the run stops
    spike_window_updates: int  # number of past losses that define a spike
    spike_sigmas: float  # a loss this many standard deviations above their mean is a spike
    spike_patience_updates: int  # consecutive spikes before the run rolls back to a checkpoint
    # rollbacks before the run stops; a whole window of updates resets the count
    max_rollbacks: int
    check_replicas_every_steps: int
    straggler_window_steps: int
    straggler_factor: float  # times slower than the other ranks
    # without progress of a rank; six times that at the start, in validation, for a sync of a save
    hang_seconds: float
    max_starts: int  # from the same position without a new checkpoint
    # save and exit with code 75 after this time; Slurm's job end is always respected
    stop_after_seconds: float | None
    stop_margin_seconds: float  # before the end of the Slurm job
    verify_shards: VerifyShards

    def __post_init__(self) -> None:
        counts = (
            self.max_skipped_updates,
            self.spike_window_updates,
            self.spike_patience_updates,
            self.check_replicas_every_steps,
            self.straggler_window_steps,
            self.max_starts,
        )
        if min(counts) < 1 or self.max_rollbacks < 0:
            raise ValueError(
                "health.max_skipped_updates, spike_window_updates, spike_patience_updates, "
                "check_replicas_every_steps, straggler_window_steps and max_starts must be at "
                "least 1, max_rollbacks at least 0"
            )
        if self.stop_margin_seconds < 0 or (self.stop_after_seconds or 1) <= 0:
            raise ValueError(
                "health.stop_margin_seconds must not be negative, stop_after_seconds above 0, or "
                "null"
            )
        if min(self.spike_sigmas, self.hang_seconds) <= 0 or self.straggler_factor <= 1:
            raise ValueError(
                "health needs spike_sigmas and hang_seconds above 0, and straggler_factor above 1"
            )
        if self.spike_patience_updates > self.max_skipped_updates:
            raise ValueError(
                "health.spike_patience_updates must not exceed health.max_skipped_updates: the "
                "run would stop before"
            )
