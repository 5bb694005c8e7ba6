"""Parameter count, FLOPs and memory traffic of a model, from its config.

Training FLOPs per token count matrix products only: 2 per multiply-add, and the backward costs
twice the forward, so 6 per matrix parameter. The input embedding is a lookup and counts as zero.
The scan, about 7 FLOPs per state element in the forward (0.4 % at 7B), is left out: MFU compares
with the usual transformer figures.

Everything else is bound by memory bandwidth or, in the scan, by exponentials. Its bytes count every
tensor that a fused kernel must read or write once. Inputs and outputs of matrix products are left
out, since those are compute-bound.
"""

from dataclasses import dataclass

from model.config import SCAN_CHUNK, ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return full shapes by parameter name, in the order of named_parameters()."""
    c = config
    layer = {
        "norm.weight": (c.d_model,),
        "mixer.conv_weight": (c.d_inner, c.d_conv),
        "mixer.conv_bias": (c.d_inner,),
        "mixer.dt_bias": (c.d_inner,),
        "mixer.A_log": (c.d_inner, c.d_state),
        "mixer.D": (c.d_inner,),
        "mixer.in_proj.weight": (2 * c.d_inner, c.d_model),
        "mixer.x_proj.weight": (c.dt_rank + 2 * c.d_state, c.d_inner),
        "mixer.dt_proj.weight": (c.d_inner, c.dt_rank),
        "mixer.out_proj.weight": (c.d_model, c.d_inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (c.vocab_size, c.d_model)}
    for index in range(c.n_layer):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes | {"final_norm.weight": (c.d_model,), "lm_head.weight": (c.vocab_size, c.d_model)}


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters; 7,272,665,088 for Falcon Mamba 7B."""
    count = 0
    for shape in parameter_shapes(config).values():
        size = 1
        for extent in shape:
            size *= extent
        count += size
    return count


def matmul_parameters(config: ModelConfig) -> int:
    """Number of parameters in matrix products; 6,994,001,920 for Falcon Mamba 7B."""
    c = config
    mixer = c.d_inner * (2 * c.d_model + (c.dt_rank + 2 * c.d_state) + c.dt_rank + c.d_model)
    return c.n_layer * mixer + c.vocab_size * c.d_model


def train_flops_per_token(config: ModelConfig) -> int:
    """FLOPs of forward and backward per token: 6 per matrix parameter."""
    return 6 * matmul_parameters(config)


@dataclass(frozen=True)
class MemoryTraffic:
    """Memory traffic and special functions per token, forward and backward of all layers."""

    residual: int  # bytes of norms and residual additions
    convolutions: int  # bytes
    scan: int  # bytes
    special_functions: int  # of the scan: exponentials, logarithms and reciprocals


def train_memory_traffic(config: ModelConfig, dtype_bytes: int = 2) -> MemoryTraffic:
    """Return a token's memory traffic outside matrix products, of `dtype_bytes` per element.

    Convolution: x in, y out; x, dy in, dx out. Scan: u, dt, z in, y out, a state every SCAN_CHUNK
    tokens; back, u, dt, z, dy in, du, ddt, dz out and the states in. Norm and addition: h and y in,
    h out, h in and the normed row out; back, h, its gradient and the row's in, h's gradient out
    twice. The scan takes one exponential per state element forward and two back, and ten more
    functions per channel.
    """
    c = config
    states = 4 * c.d_inner * c.d_state // SCAN_CHUNK
    residual = c.d_model * (12 + 2 * dtype_bytes) + c.d_model * (16 + dtype_bytes)
    convolutions = 5 * c.d_inner * dtype_bytes
    scan = 11 * c.d_inner * dtype_bytes + 2 * states
    special_functions = 3 * c.d_inner * c.d_state + 10 * c.d_inner
    return MemoryTraffic(
        c.n_layer * residual,
        c.n_layer * convolutions,
        c.n_layer * scan,
        c.n_layer * special_functions,
    )
