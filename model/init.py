"""Initial values by parameter name.

| parameter | initial value | source |
|---|---|---|
| embedding, lm_head | N(0, embedding_std) | state-spaces/mamba: 0.02; TII's is not published |
| norm weights | 1 | usual |
| in_proj, x_proj | U(+-1/sqrt(fan_in)) | torch's Linear default, as in state-spaces/mamba |
| out_proj | U(+-1/sqrt(fan_in)) / sqrt(n_layer) | state-spaces/mamba (GPT-2's residual rule) |
| conv weight, bias | U(+-1/sqrt(d_conv)) | torch's Conv1d default (depthwise: fan_in = d_conv) |
| dt_proj | U(+-dt_rank^-0.5) | arXiv 2312.00752, section 3.6; config of the released weights |
| dt_bias | softplus^-1 of exp(U(ln dt_min, ln dt_max)), at least dt_floor | idem |
| A_log | ln(1..d_state) in every channel (S4D-real) | arXiv 2312.00752, section 3.6 |
| D | 1 | idem |

Each full parameter is drawn from its own generator, seeded by (seed, name), and then sharded: the
initial model is the same for any tensor-parallel size, order of construction and device.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.flops import parameter_shapes


def initial_value(name: str, config: ModelConfig, seed: int) -> Tensor:
    """Return a full parameter's initial value, fp32 on the CPU: a function of the arguments."""
    shape = parameter_shapes(config)[name]
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    kind = name.rsplit("layers.", 1)[-1].split(".", 1)[-1] if name.startswith("layers.") else name
    match kind:
        case "embedding.weight" | "lm_head.weight":
            return torch.empty(shape).normal_(0.0, config.embedding_std, generator=generator)
        case "norm.weight" | "final_norm.weight" | "mixer.D":
            return torch.ones(shape)
        case "mixer.in_proj.weight" | "mixer.x_proj.weight" | "mixer.dt_proj.weight":
            bound = shape[1] ** -0.5
            return uniform(-bound, bound)
        case "mixer.out_proj.weight":
            bound = (shape[1] * config.n_layer) ** -0.5
            return uniform(-bound, bound)
        case "mixer.conv_weight" | "mixer.conv_bias":
            bound = config.d_conv**-0.5
            return uniform(-bound, bound)
        case "mixer.dt_bias":
            dt = (
                uniform(math.log(config.dt_min), math.log(config.dt_max))
                .exp()
                .clamp(min=config.dt_floor)
            )
            return dt + torch.log(-torch.expm1(-dt))
        case "mixer.A_log":
            return (
                torch.arange(1, config.d_state + 1, dtype=torch.float32)
                .log()
                .repeat(config.d_inner, 1)
            )
    raise AssertionError(f"no initial value for {name}")


@torch.no_grad()
def initialize(
    model: nn.Module, config: ModelConfig, seed: int, shard: Callable[[str, Tensor], Tensor]
) -> None:
    """Set a model's initial values; `shard(name, full)` returns this rank's shard."""
    for name, parameter in model.named_parameters():
        parameter.copy_(shard(name, initial_value(name, config, seed)))
