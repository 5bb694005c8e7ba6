"""Parameters and FLOPs of a model, from its shape alone.

Training FLOPs per token count matrix products only, 2 per multiply-add, and twice the forward for
the backward: 6 per matrix parameter that a token meets. The input embedding is a lookup and meets
none. The scan adds about 7 FLOP per state element forward (0.4 % at 7B) and is left out, so that
MFU compares with the usual transformer figures.

What is not a matrix product runs at the speed of memory, or, in the scan, of exponentials. Bytes
count every tensor that a fused kernel must read or write once; products' own inputs and outputs are
left out, since they hide behind them.
"""

from dataclasses import dataclass

from model.config import SCAN_CHUNK, ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every parameter, in the order of the model's named_parameters."""
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
    """Parameters of every token's matrix products; 6,994,001,920 for Falcon Mamba 7B."""
    c = config
    mixer = c.d_inner * (2 * c.d_model + (c.dt_rank + 2 * c.d_state) + c.dt_rank + c.d_model)
    return c.n_layer * mixer + c.vocab_size * c.d_model


def train_flops_per_token(config: ModelConfig) -> int:
    """FLOPs of forward and backward per token: 6 per matrix parameter."""
    return 6 * matmul_parameters(config)


@dataclass(frozen=True)
class Traffic:
    """Bytes of memory and special functions per token, forward and backward of all layers."""

    residual: int  # bytes of norms and residual additions
    convolutions: int  # bytes
    scan: int  # bytes of the scan
    specials: int  # exponentials, logarithms and reciprocals of the scan


def train_traffic(config: ModelConfig, width: int = 2) -> Traffic:
    """What a token moves outside matrix products; `width` bytes per element of the products' type.

    Convolution: x in, y out; x, dy in, dx out. Scan: u, dt, z in, y out, a state every SCAN_CHUNK
    tokens; back, u, dt, z, dy in, du, ddt, dz out and the states in. Norm and addition: h and y in,
    h out, h in and the normed row out; back, h, its gradient and the row's in, h's gradient out
    twice. The scan takes one exponential per state element forward and two back, and ten more
    functions per channel.
    """
    c = config
    states = 4 * c.d_inner * c.d_state // SCAN_CHUNK
    residual = c.d_model * (12 + 2 * width) + c.d_model * (16 + width)
    convolutions = 5 * c.d_inner * width
    scan = 11 * c.d_inner * width + 2 * states
    specials = 3 * c.d_inner * c.d_state + 10 * c.d_inner
    return Traffic(
        c.n_layer * residual, c.n_layer * convolutions, c.n_layer * scan, c.n_layer * specials
    )
