"""Rules by parameter name, torch-free: sharding over tensor-parallel ranks, weight decay, dtype.

Initial values, checkpoints, export and the planner's sizes all use the sharding table.
"""

from dataclasses import dataclass
from functools import cache

# assumed: no weight decay on norms, biases, A_log, D and dt_bias. state-spaces/mamba exempts only
# A_log and D; the embedding is decayed there
NO_DECAY = ("norm.weight", "A_log", ".D", "dt_bias", "conv_bias")


@dataclass(frozen=True)
class ShardSpec:
    """Shard along `dim`; with blocks > 1 each stacked block is sharded (in_proj: x over z)."""

    dim: int
    blocks: int = 1


SHARDING = {
    "embedding.weight": ShardSpec(0),
    "mixer.in_proj.weight": ShardSpec(0, blocks=2),
    "mixer.conv_weight": ShardSpec(0),
    "mixer.conv_bias": ShardSpec(0),
    "mixer.x_proj.weight": ShardSpec(1),
    "mixer.dt_proj.weight": ShardSpec(0),
    "mixer.dt_bias": ShardSpec(0),
    "mixer.A_log": ShardSpec(0),
    "mixer.D": ShardSpec(0),
    "mixer.out_proj.weight": ShardSpec(1),
    "lm_head.weight": ShardSpec(0),
}


@cache  # a plan asks for every name of a 7B in every layout
def shard_spec(name: str) -> ShardSpec | None:
    """Return how a parameter is sharded, or None if every rank holds all of it."""
    return next((spec for suffix, spec in SHARDING.items() if name.endswith(suffix)), None)


def has_weight_decay(name: str) -> bool:
    """Whether weight decay applies to a parameter of this name."""
    return not name.endswith(NO_DECAY)


def is_matmul_weight(name: str) -> bool:
    """Whether a parameter enters matrix products or the embedding; all others stay fp32."""
    return has_weight_decay(name) and name.endswith(".weight")
