"""Parameters and FLOPs of a model, from its shape alone.

Training FLOPs per token count matrix products only, 2 per multiply-add, and twice the forward for the backward: 6 per
matrix parameter that a token meets. The input embedding is a lookup and meets none. The scan adds about 7 FLOP per
state element forward (0.4 % at 7B) and is left out, so that MFU compares with the usual transformer figures.
"""

from model.config import ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every parameter, in the model's own order."""
    c = config
    layer = {
        "norm.weight": (c.d_model,),
        "mixer.in_proj.weight": (2 * c.d_inner, c.d_model),
        "mixer.conv_weight": (c.d_inner, c.d_conv),
        "mixer.conv_bias": (c.d_inner,),
        "mixer.x_proj.weight": (c.dt_rank + 2 * c.d_state, c.d_inner),
        "mixer.dt_proj.weight": (c.d_inner, c.dt_rank),
        "mixer.dt_bias": (c.d_inner,),
        "mixer.A_log": (c.d_inner, c.d_state),
        "mixer.D": (c.d_inner,),
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
    """Parameters of the matrix products that every token meets; 6,994,001,920 for Falcon Mamba 7B."""
    c = config
    mixer = c.d_inner * (2 * c.d_model + (c.dt_rank + 2 * c.d_state) + c.dt_rank + c.d_model)
    return c.n_layer * mixer + c.vocab_size * c.d_model


def train_flops_per_token(config: ModelConfig) -> int:
    """FLOPs of forward and backward per token: 6 per matrix parameter."""
    return 6 * matmul_parameters(config)
