"""Tensor names and config fields, ours <-> transformers' FalconMambaForCausalLM, a table each."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from core.errors import InputError
from model.config import ModelConfig
from model.flops import parameter_count
from model.hf_writer import Entry, json_bytes, plan, write
from model.sharding import shard

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
    """Pairs (our name, transformers' name) of all tensors, in transformers' state dict order."""
    yield from TENSORS_BEFORE.items()
    for index in range(n_layer):
        for ours, theirs in TENSORS_OF_LAYER.items():
            yield f"layers.{index}.{ours}", f"backbone.layers.{index}.{theirs}"
    yield from TENSORS_AFTER.items()


def to_hf(name: str, tensor: Tensor) -> Tensor:
    """Our tensor, or rows, in transformers' shape: conv weights gain Conv1d's channel axis."""
    return tensor.unsqueeze(1) if name.endswith("conv_weight") else tensor


def from_hf(name: str, tensor: Tensor) -> Tensor:
    """transformers' tensor in our shape; `name` is ours. Inverse of to_hf."""
    return tensor.squeeze(1) if name.endswith("conv_weight") else tensor


def hf_config(config: ModelConfig, eos: int, dtype: str) -> dict[str, Any]:
    """config.json of a model; eos is also bos and pad, since the tokenizer has no bos.

    The released config has bos 0 = >>TITLE<<.
    """
    if not config.mixer_norms:
        raise ValueError(
            "model.mixer_norms is false: that is plain Mamba, which FalconMambaForCausalLM "
            "cannot express"
        )
    if config.d_inner % config.d_model:
        raise ValueError(
            f"model.d_inner {config.d_inner} is no multiple of d_model {config.d_model}, as "
            "expand must be"
        )
    return {
        "architectures": ["FalconMambaForCausalLM"],
        "model_type": "falcon_mamba",
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        # readers take d_inner from either key; the released config's expand 16 contradicts its
        # intermediate_size
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
    """Our config from a falcon_mamba config.json; raises ValueError for what we do not train."""
    if raw.get("model_type") != "falcon_mamba":
        raise ValueError(
            f"model_type is {raw.get('model_type')!r}; only falcon_mamba folders can be read"
        )
    if (
        raw.get("tie_word_embeddings", True)
        or raw.get("use_bias")
        or not raw.get("use_conv_bias", True)
    ):
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
    """Overrides that give `wanted` the network of a folder; ignores initial-value settings."""
    initial = ("embedding_std", "dt_min", "dt_max", "dt_floor")
    names = [field.name for field in fields(ModelConfig) if field.name not in initial]
    return [
        f"model.{name}={getattr(folder, name)}"
        for name in names
        if getattr(folder, name) != getattr(wanted, name)
    ]


class HfFolder:
    """The weights of a Hugging Face FalconMamba folder under our names, read tensor by tensor.

    Raises ValueError for a folder that is none, or whose tensors are not those of its config.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.config = model_config(raw)
            self.files = self._files()
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder} is no folder of transformers' layout with safetensors weights: {error}"
            ) from error
        self.names = dict(tensor_names(self.config.n_layer))
        if self.files.keys() != set(self.names.values()):
            odd = sorted(self.files.keys() ^ set(self.names.values()))
            raise ValueError(
                f"{folder}: {len(odd)} tensors missing or unknown to its config, such as {odd[0]}"
            )

    def _files(self) -> dict[str, Path]:
        """Tensor name -> file that holds it."""
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            single = self.folder / "model.safetensors"
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if odd := sorted(name for name in places.values() if Path(name).name != name):
            raise ValueError(f"{index} names {odd[0]}, which lies outside its folder")
        return {tensor: self.folder / name for tensor, name in places.items()}

    def read_full(self, name: str) -> Tensor:
        """The whole tensor of our name, fp32 on the CPU."""
        return self.read_rows(name, 0, None)

    def read_rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows [start, stop) of the tensor of our name, fp32 on the CPU."""
        theirs = self.names[name]
        with safe_open(self.files[theirs], framework="pt") as file:
            return from_hf(name, file.get_slice(theirs)[start:stop]).float()


@torch.no_grad()
def initialize_from(model: Any, folder: Path, tp_rank: int = 0, tp_size: int = 1) -> None:
    """Fill a FalconMamba, or the part of it that a tensor-parallel rank holds, out of a Hugging
    Face folder.

    Raises InputError when the folder holds no FalconMamba, or another network than `model`.
    """
    try:
        source = HfFolder(folder)
    except ValueError as error:
        raise InputError(str(error)) from error
    if unlike := differences(source.config, model.config):
        raise InputError(f"{source.folder} holds another network: give {' '.join(unlike)}")
    for name, parameter in model.named_parameters():
        parameter.copy_(shard(name, source.read_full(name), tp_rank, tp_size))


@torch.no_grad()
def save(model: Any, folder: Path | str, eos: int) -> None:
    """Write a whole FalconMamba in fp32 as a Hugging Face folder, which initialize_from reads.

    Files of an earlier save are replaced; the tokenizer is not written. Raises ValueError for a
    model that transformers has no config for, an `eos` outside the vocabulary, and a model of which
    this rank holds a part. eval/export.py exports a run: in pieces, any type, compared.
    """
    folder = Path(folder)
    config = hf_config(model.config, eos, "float32")
    if not 0 <= eos < model.config.vocab_size:
        raise ValueError(f"eos is {eos}; the vocabulary has ids 0 to {model.config.vocab_size - 1}")
    if sum(p.numel() for p in model.parameters()) != parameter_count(model.config):
        raise ValueError("the model is one rank's part: gather it, or use eval/export.py")
    parameters = {name: to_hf(name, tensor) for name, tensor in model.named_parameters()}
    entries = (
        Entry(ours, theirs, torch.float32, tuple(parameters[ours].shape))
        for ours, theirs in tensor_names(model.config.n_layer)
    )
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(
        part,
        plan(entries),
        lambda name, start, stop: parameters[name][start:stop].float().cpu(),
        lambda line: None,
    )
    (part / "config.json").write_bytes(json_bytes(config))
    folder.mkdir(exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    for file in part.iterdir():
        file.replace(folder / file.name)
    part.rmdir()
