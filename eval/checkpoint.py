"""A trained model out of a run's newest valid checkpoint."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.config import InputError
from eval.config import EvaluationConfig
from model.config import Backend
from model.kernels import load as kernels_of
from model.mamba import FalconMamba
from model.weights import MANIFEST, Pieces, newest_valid, read_state


def find(config: EvaluationConfig) -> Path:
    """The newest checkpoint that verifies; raises InputError when there is none or it holds another model."""
    folder, passed = newest_valid(config.run.checkpoints)
    for line in passed:
        print(f"warning: {line}", flush=True)
    if folder is None:
        raise InputError(f"no checkpoint in {config.run.checkpoints}: train first, with the same overrides")
    if read_state(folder)["model"] != asdict(config.model):
        raise InputError(f"{folder} holds another model than the config: give the overrides it was trained with")
    return folder


def identity(folder: Path, config: EvaluationConfig) -> dict[str, Any]:
    """What a result was made of: equal to the stored one, the result still holds and need not be made again."""
    manifest = (folder / MANIFEST).read_bytes()
    return {
        "checkpoint": folder.name,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "tokens": read_state(folder)["tokens"],
        "settings": asdict(config.eval),
    }


def load(config: EvaluationConfig, folder: Path) -> FalconMamba:
    """The model of a checkpoint in fp32 on the CPU, ready to evaluate."""
    pieces, kernels = Pieces(folder), kernels_of(Backend.auto, "cpu")
    with torch.device("meta"):
        model = FalconMamba(config.model, kernels)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(pieces.full("param", name))
    return model.eval()
