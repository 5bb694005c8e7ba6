"""A trained model out of a run's newest valid checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.config import InputError
from eval.config import EvaluationConfig
from model.config import Backend
from model.kernels import load as kernels_of
from model.mamba import FalconMamba
from model.weights import MANIFEST, Pieces, fault, newest_valid, read_state, sha256_of


def find(config: EvaluationConfig) -> Path:
    """The newest checkpoint that verifies, or the one that eval.checkpoint names.

    Raises InputError when there is none or it holds another model.
    """
    if config.eval.checkpoint is not None:
        folder = Path(config.eval.checkpoint)
        if (why := fault(folder)) is not None:
            raise InputError(f"checkpoint {folder} cannot be used: {why}")
    else:
        newest, faults = newest_valid(config.run.checkpoints)
        for damaged, why in faults.items():
            print(f"warning: checkpoint {damaged} is not used: {why}", flush=True)
        if newest is None:
            raise InputError(f"no checkpoint in {config.run.checkpoints}: train first, with the same overrides")
        folder = newest
    if read_state(folder)["model"] != asdict(config.model):
        raise InputError(f"{folder} holds another model than the config: give the overrides it was trained with")
    return folder


def exported(config: EvaluationConfig, folder: Path) -> Path:
    """Where the export of a checkpoint lies: `hf` for the newest, `hf-step-N` for one that was asked for."""
    return config.run.hf if config.eval.checkpoint is None else config.run.folder / f"hf-{folder.name}"


def identity(folder: Path) -> dict[str, Any]:
    """Which checkpoint a result was made of."""
    return {
        "checkpoint": folder.name,
        "manifest_sha256": sha256_of(folder / MANIFEST),
        "tokens": read_state(folder)["tokens"],
    }


def write_result(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON result into place at once."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.rename(path)


def read_result(path: Path) -> dict[str, Any]:
    """A stored result; empty when there is none or it is damaged, so that it is made anew."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


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
