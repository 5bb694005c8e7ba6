"""Map tensor names and config fields to transformers' FalconMambaForCausalLM, and back."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from core.errors import InputError
from core.files import make_folder, move_into, sync_folder, write_bytes
from core.records import DamagedRecord, parse_typed, read_typed
from model.config import ModelConfig
from model.flops import parameter_count
from model.hf_writer import Entry, json_bytes, plan_files, write_files
from model.sharding import shard

# in the order of transformers' state dict, which decides which tensor goes into which file
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

HF_CONFIG = "config.json"
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
    """Yield (our name, transformers' name) of all tensors in transformers' state dict order."""
    yield from TENSORS_BEFORE.items()
    for index in range(n_layer):
        for ours, theirs in TENSORS_OF_LAYER.items():
            yield f"layers.{index}.{ours}", f"backbone.layers.{index}.{theirs}"
    yield from TENSORS_AFTER.items()


def to_hf(name: str, tensor: Tensor) -> Tensor:
    """Convert our tensor, or rows of it: conv weights gain Conv1d's channel axis."""
    return tensor.unsqueeze(1) if name.endswith("conv_weight") else tensor


def from_hf(name: str, tensor: Tensor) -> Tensor:
    """Convert transformers' tensor; `name` is ours. Inverse of to_hf."""
    return tensor.squeeze(1) if name.endswith("conv_weight") else tensor


def hf_config(
    config: ModelConfig, eos: int | None, dtype: str, pad: int | None = None
) -> dict[str, Any]:
    """Return a model's config.json. Raises ValueError if transformers cannot express the model.

    eos is also bos, since training puts no other token before a document, and pad if there is none;
    the released config has bos 0, which is the token >>TITLE<<. None says that no id ends a text.
    """
    if not config.mixer_norms:
        raise ValueError(
            "model.mixer_norms is false: that is plain Mamba, which FalconMambaForCausalLM "
            "cannot express"
        )
    padding: dict[str, Any] = {}
    if config.vocab_size % 8:  # llama.cpp's converter would add rows that the embedding lacks
        padding = {"pad_vocab_size_multiple": 1}
    if config.d_inner % config.d_model:
        raise ValueError(
            f"model.d_inner {config.d_inner} is no multiple of d_model {config.d_model}, as "
            "expand must be"
        )
    return {
        "architectures": ["FalconMambaForCausalLM"],
        "model_type": "falcon_mamba",
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        **padding,
        # readers take d_inner from either key; the released config's expand 16 contradicts its
        # intermediate_size
        "expand": config.d_inner // config.d_model,
        "hidden_act": "silu",
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": eos if pad is None else pad,
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


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """Convert a falcon_mamba config.json. Raises ValueError for options that we do not train."""
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
    try:
        return parse_typed(json.dumps({**values, "mixer_norms": True}), ModelConfig, HF_CONFIG)
    except DamagedRecord as error:  # names its key as the file does
        text = " ".join(FIELDS.get(word, word) for word in str(error).split(" "))
        raise ValueError(text) from error


def end_id(raw: dict[str, Any]) -> int | None:
    """The id of a config.json that ends a document, the first of several; None without one."""
    eos = raw.get("eos_token_id")
    if isinstance(eos, list) and eos:
        eos = eos[0]
    return eos if isinstance(eos, int) else None


def config_differences(folder: ModelConfig, config: ModelConfig) -> list[str]:
    """Return the overrides that turn `config` into a folder's; initial values are ignored."""
    initial = ("embedding_std", "dt_min", "dt_max", "dt_floor")
    names = [field.name for field in fields(ModelConfig) if field.name not in initial]
    return [
        f"model.{name}={getattr(folder, name)}"
        for name in names
        if getattr(folder, name) != getattr(config, name)
    ]


class HfFolder:
    """Reads the weights of a Hugging Face FalconMamba folder tensor by tensor, by our names.

    Raises ValueError for a folder of another kind, or whose tensors do not match its config.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            raw = read_typed(folder / HF_CONFIG, dict[str, Any])
            self.config = config_from_hf(raw)
            self.eos = end_id(raw)
            self.files = self._files()
        except KeyError as error:
            raise ValueError(f"{folder / HF_CONFIG}: {error.args[0]} is missing") from error
        except (OSError, TypeError, OverflowError, SafetensorError, DamagedRecord) as error:
            raise ValueError(
                f"{folder} is not a transformers folder with safetensors weights: {error}"
            ) from error
        layers = min(self.config.n_layer, len(self.files))  # a wrong number of them costs no memory
        self.names = dict(tensor_names(layers))
        if layers < self.config.n_layer or self.files.keys() != set(self.names.values()):
            unexpected = sorted(self.files.keys() ^ set(self.names.values()))
            raise ValueError(
                f"{folder}: {len(unexpected)} tensors are missing or not in its config, such as "
                f"{unexpected[0]}"
            )

    def _files(self) -> dict[str, Path]:
        """Return the file of each tensor."""
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            single = self.folder / "model.safetensors"
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        content = read_typed(index, dict[str, Any])
        weight_map = parse_typed(json.dumps(content.get("weight_map")), dict[str, str], str(index))
        if outside := sorted(name for name in weight_map.values() if Path(name).name != name):
            raise ValueError(f"{index} names {outside[0]}, which is outside its folder")
        return {tensor: self.folder / name for tensor, name in weight_map.items()}

    def read_full(self, name: str) -> Tensor:
        """Return a full tensor by our name, fp32 on the CPU."""
        return self.read_rows(name, 0, None)

    def read_rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Return rows [start, stop) of a tensor by our name, fp32 on the CPU."""
        hf_name = self.names[name]
        with safe_open(self.files[hf_name], framework="pt") as file:
            rows = file.get_slice(hf_name)[start:stop]
        if not rows.is_floating_point():
            raise InputError(f"{self.files[hf_name]}: {hf_name} has type {rows.dtype}, no weights")
        return from_hf(name, rows).float()


def open_hf_folder(folder: Path, config: ModelConfig) -> HfFolder:
    """Open a folder of a model's weights; no weight is read.

    Raises InputError if the folder holds no FalconMamba or one of another shape.
    """
    try:
        source = HfFolder(folder)
    except ValueError as error:
        raise InputError(str(error)) from error
    if overrides := config_differences(source.config, config):
        raise InputError(f"{source.folder} has another shape: give {' '.join(overrides)}")
    return source


@torch.no_grad()
def load_hf_weights(model: Any, folder: Path, tp_rank: int = 0, tp_size: int = 1) -> None:
    """Load a Hugging Face folder into a FalconMamba or a tensor-parallel rank's shard of it.

    Raises InputError if the folder holds no FalconMamba or one of another shape.
    """
    source = open_hf_folder(folder, model.config)
    try:
        for name, parameter in model.named_parameters():
            parameter.copy_(shard(name, source.read_full(name), tp_rank, tp_size))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{source.folder} cannot be read ({error}): download or export it again"
        ) from error


@torch.no_grad()
def save_hf(model: Any, folder: Path | str, eos: int | None) -> None:
    """Write a whole FalconMamba in fp32 as a Hugging Face folder, which HfFolder reads.

    Replaces the files of an earlier save; does not write the tokenizer. Raises ValueError for a
    model that transformers cannot express, an `eos` outside the vocabulary, and a tensor-parallel
    rank's shard. eval/export.py exports a run: in chunks, in any dtype, and compares the result.
    """
    folder = Path(folder)
    config = hf_config(model.config, eos, "float32")
    if eos is not None and not 0 <= eos < model.config.vocab_size:
        raise ValueError(f"eos is {eos}; the vocabulary has ids 0 to {model.config.vocab_size - 1}")
    if sum(p.numel() for p in model.parameters()) != parameter_count(model.config):
        raise ValueError("the model is a tensor-parallel shard: use eval/export.py on a checkpoint")
    parameters = {name: to_hf(name, tensor) for name, tensor in model.named_parameters()}
    entries = (
        Entry(name, hf_name, torch.float32, tuple(parameters[name].shape))
        for name, hf_name in tensor_names(model.config.n_layer)
    )
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    write_files(
        temporary,
        plan_files(entries),
        lambda name, start, stop: parameters[name][start:stop].float().cpu(),
        lambda line: None,
    )
    write_bytes(temporary / "config.json", json_bytes(config))
    sync_folder(temporary)
    make_folder(folder)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    move_into(folder, list(temporary.iterdir()))
    temporary.rmdir()


def accelerate(model: nn.Module, *, loss: bool = False) -> nn.Module:
    """Put our convolution, norms and scan into a FalconMambaForCausalLM of transformers 5.

    Changes the model and returns it; parameters, config, saving, generate() and adapters of PEFT
    stay as they are, and a second call only sets `loss`. With `loss` a forward with labels returns
    our loss and no logits, which it never holds at once. `position_ids` or `seq_idx` [b, l] of the
    forward then reset the state where documents start. Raises InputError for other models.
    """
    from model.hf_accelerate import replace_classes

    replace_classes(model, loss=loss)
    return model
