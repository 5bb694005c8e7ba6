"""When a step, a rank or a start counts as failed. Torch-free; the values stand in configs/."""

from dataclasses import dataclass
from enum import Enum


class VerifyShards(Enum):
    """When the hashes of the token shards are checked; their sizes are checked at every start."""

    before = "before"  # training begins when all are
    background = "background"  # training begins at once, and stops at the first bad one
    never = "never"


@dataclass
class HealthConfig:
    """What a run does about faulty steps, ranks and starts (train/README.md has the table)."""

    max_skipped_updates: int  # updates in a row that may be skipped
    spike_window_updates: int  # updates whose losses a new one is compared with
    spike_sigmas: float  # standard deviations above their mean that make a spike
    spike_patience_updates: int  # spikes in a row after which the run rolls back to a checkpoint
    # the run stops when a spike lasts again after as many; a whole window of good updates resets it
    max_rollbacks: int
    check_replicas_every_steps: int
    straggler_window_steps: int
    straggler_factor: float  # times slower than the other ranks
    hang_seconds: float  # without a move of a rank; six times as long at start and at the end
    max_starts: int  # from one position, without a new checkpoint
    # save and exit with code 75 after as many seconds; the end of a Slurm job counts in any case
    stop_after_seconds: float | None
    stop_margin_seconds: float  # before Slurm's end of the job
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
                "counts and windows of health must be at least 1, max_rollbacks at least 0"
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
