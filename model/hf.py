"""Ours <-> transformers' FalconMambaForCausalLM: one table of tensor names and one of config fields, used both ways."""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import Tensor

from model.config import ModelConfig

# in the order of transformers' state dict, which decides how tensors fall into files
TENSORS_BEFORE = {"embedding.weight": "backbone.embeddings.weight"}
TENSORS_OF_LAYER = {
    "norm.weight": "norm.weight",
    "mixer.A_log": "mixer.A_log",
    "mixer.D": "mixer.D",
    "mixer.conv_weight": "mixer.conv1d.weight",
    "mixer.conv_bias": "mixer.conv1d.bias",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.x_proj.weight": "mixer.x_proj.weight",
    "mixer.dt_proj.weight": "mixer.dt_proj.weight",
    "mixer.dt_bias": "mixer.dt_proj.bias",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
}
TENSORS_AFTER = {"final_norm.weight": "backbone.norm_f.weight", "lm_head.weight": "lm_head.weight"}

FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_inner": "intermediate_size",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "dt_rank": "time_step_rank",
    "norm_eps": "layer_norm_epsilon",
    "mixer_norm_eps": "mixer_rms_eps",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_floor": "time_step_floor",
    "embedding_std": "initializer_range",
}


def tensor_names(n_layer: int) -> Iterator[tuple[str, str]]:
    """Pairs (our name, transformers' name) of every tensor, in the order of transformers' state dict."""
    yield from TENSORS_BEFORE.items()
    for index in range(n_layer):
        for ours, theirs in TENSORS_OF_LAYER.items():
            yield f"layers.{index}.{ours}", f"backbone.layers.{index}.{theirs}"
    yield from TENSORS_AFTER.items()


def to_hf(name: str, tensor: Tensor) -> Tensor:
    """Our tensor, or rows of it, in transformers' shape: conv weights gain the channel axis of a depthwise Conv1d."""
    return tensor.unsqueeze(1) if name.endswith("conv_weight") else tensor


def from_hf(name: str, tensor: Tensor) -> Tensor:
    """transformers' tensor in our shape; `name` is ours. Inverse of to_hf."""
    return tensor.squeeze(1) if name.endswith("conv_weight") else tensor


def hf_config(config: ModelConfig, eos: int, dtype: str) -> dict[str, Any]:
    """config.json of a model; eos is also bos and pad, since the tokenizer has no bos (released: bos 0 = >>TITLE<<)."""
    if not config.mixer_norms:
        raise ValueError("model.mixer_norms is false: that is plain Mamba, which FalconMambaForCausalLM cannot express")
    if config.d_inner % config.d_model:
        raise ValueError(
            f"model.d_inner {config.d_inner} is no multiple of d_model {config.d_model}, as expand must be"
        )
    return {
        "architectures": ["FalconMambaForCausalLM"],
        "model_type": "falcon_mamba",
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        # readers take d_inner from either key; the released config's expand 16 contradicts its intermediate_size
        "expand": config.d_inner // config.d_model,
        "hidden_act": "silu",
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "tie_word_embeddings": False,  # the class default is true
        "time_step_init_scheme": "random",
        "time_step_scale": 1.0,
        "torch_dtype": dtype,
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
    }


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """Our config from a config.json of model type falcon_mamba; raises ValueError for what we do not train."""
    if raw.get("model_type") != "falcon_mamba":
        raise ValueError(f"model_type is {raw.get('model_type')!r}; only falcon_mamba folders can be read")
    if raw.get("tie_word_embeddings", True) or raw.get("use_bias") or not raw.get("use_conv_bias", True):
        raise ValueError("only untied embeddings, no linear bias and a conv bias are supported")
    # transformers' class defaults, for keys that the released config leaves out
    filled = {
        "mixer_rms_eps": 1e-6,
        "layer_norm_epsilon": 1e-5,
        "time_step_min": 1e-3,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "initializer_range": 0.1,
        **raw,
    }
    filled.setdefault("intermediate_size", filled.get("expand", 2) * filled["hidden_size"])
    if filled.get("time_step_rank", "auto") == "auto":
        filled["time_step_rank"] = math.ceil(filled["hidden_size"] / 16)
    values = {ours: filled[theirs] for ours, theirs in FIELDS.items()}
    return ModelConfig(mixer_norms=True, **values)


def differences(folder: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Overrides that would give `wanted` the network of a folder; what shapes initial values only is not compared."""
    initial = ("embedding_std", "dt_min", "dt_max", "dt_floor")
    names = [field.name for field in fields(ModelConfig) if field.name not in initial]
    return [f"model.{name}={getattr(folder, name)}" for name in names if getattr(folder, name) != getattr(wanted, name)]
