"""A FalconMamba from a folder and into one: transformers' folder, a run, or a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from core.errors import InputError
from model.checkpoint import CheckpointReader, read_model
from model.config import ModelConfig
from model.find_checkpoint import resolve_checkpoint
from model.flops import parameter_shapes
from model.hf import HF_CONFIG, HfFolder, save_hf


class PretrainedMixin:
    """Methods of FalconMamba that read and write folders."""

    eos: int | None

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a transformers folder, the newest valid checkpoint of a run, or a checkpoint.

        A checkpoint is verified first. Tensors are read one by one, so the peak memory is the
        model's in `dtype` and one tensor's in fp32. Nothing is executed or downloaded. Raises
        InputError for another kind of folder and for damaged files.
        """
        return cls.from_weights(open_weights(Path(folder)), device, dtype)

    @classmethod
    def from_weights(
        cls, weights: "Weights", device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Build the model of opened weights; see from_pretrained."""
        with torch.device("meta"):
            model: Any = cls(weights.config)  # type: ignore[call-arg]
        fill(model, lambda name: weights.read(name).to(device, dtype))
        model.eos = weights.eos
        model.choose_kernels()
        return model

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a transformers folder in fp32, without a tokenizer; from_pretrained reads it.

        Raises ValueError for a model that transformers cannot express, a `model.eos` outside the
        vocabulary, and a tensor-parallel rank's shard.
        """
        save_hf(self, folder, self.eos)


@dataclass(frozen=True)
class Weights:
    """The model of a folder; `read` returns a full tensor in fp32 by our name."""

    config: ModelConfig
    read: Callable[[str], Tensor]
    eos: int | None  # None: the folder does not say


def open_weights(folder: Path) -> Weights:
    """Open a transformers folder, a run or a checkpoint; raises InputError for other folders."""
    try:
        if (folder / HF_CONFIG).is_file():
            hf = HfFolder(folder)
            return Weights(hf.config, hf.read_full, hf.eos)
        return checkpoint_weights(resolve_checkpoint(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"no model in {folder}: {error}") from error


def checkpoint_weights(checkpoint: Path) -> Weights:
    """Open a checkpoint, which the caller has verified; raises InputError for a wrong index."""
    config = read_model(checkpoint)
    reader = CheckpointReader(checkpoint)
    reader.require(parameter_shapes(config), ("param",))
    return Weights(config, lambda name: reader.read_full("param", name), None)


def fill(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Replace every parameter by `read(name)`, one at a time."""
    try:
        for name, old in list(model.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            tensor = read(name)
            if tensor.shape != old.shape:
                raise InputError(f"{name} has shape {list(tensor.shape)}, not {list(old.shape)}")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name} cannot be read ({error}): download it again") from error
