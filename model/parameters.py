"""Rules by parameter name, torch-free: how tensor-parallel ranks cut it, whether it decays, whether
products take it.

The cut table serves initial values, checkpoints, export and the sizes of a plan: whoever holds a
part can say which part of what it is.
"""

from dataclasses import dataclass
from functools import cache

# assumed: no weight decay on norms, biases, A_log, D and dt_bias. state-spaces/mamba exempts only
# A_log and D; the embedding is decayed there
NO_DECAY = ("norm.weight", "A_log", ".D", "dt_bias", "conv_bias")


@dataclass(frozen=True)
class Cut:
    """A split along `dim`; with parts > 1 each stacked part is split (in_proj: x over z)."""

    dim: int
    parts: int = 1


CUTS = {
    "embedding.weight": Cut(0),
    "mixer.in_proj.weight": Cut(0, parts=2),
    "mixer.conv_weight": Cut(0),
    "mixer.conv_bias": Cut(0),
    "mixer.x_proj.weight": Cut(1),
    "mixer.dt_proj.weight": Cut(0),
    "mixer.dt_bias": Cut(0),
    "mixer.A_log": Cut(0),
    "mixer.D": Cut(0),
    "mixer.out_proj.weight": Cut(1),
    "lm_head.weight": Cut(0),
}


@cache  # a plan asks for every name of a 7B in every layout
def cut_of(name: str) -> Cut | None:
    """How a parameter is cut; None means every rank holds all of it."""
    return next((cut for suffix, cut in CUTS.items() if name.endswith(suffix)), None)


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter of this name."""
    return not name.endswith(NO_DECAY)


def in_products(name: str) -> bool:
    """Whether a parameter is in matrix products or the embedding; others are always fp32."""
    return decays(name) and name.endswith(".weight")
