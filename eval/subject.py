"""What is evaluated: a run's newest valid checkpoint, a named one or a Hugging Face folder."""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core.errors import InputError
from core.files import sha256_of
from core.old_keys import load_config
from core.run import MANIFEST
from data.stream.manifests import tokenizer_path
from eval.config import EvaluationConfig
from model.checkpoint import CheckpointReader, newest_valid, read_state, verify_checkpoint
from model.config import Backend, ModelConfig
from model.hf import HfFolder
from model.kernels import load as kernels_of
from model.mamba import FalconMamba

logger = logging.getLogger(__name__)


def find_checkpoint(config: EvaluationConfig) -> Path:
    """The newest checkpoint that verifies, or the one that run.checkpoint names.

    Raises InputError when there is none or it holds another model.
    """
    folder = verified_checkpoint(config)
    if read_state(folder)["model"] != asdict(config.model):
        raise InputError(
            f"{folder} holds another model than the config: give the overrides it was trained with"
        )
    return folder


def verified_checkpoint(config: EvaluationConfig) -> Path:
    """As find_checkpoint, whatever model it holds."""
    if config.run.checkpoint is not None:
        folder = Path(config.run.checkpoint)
        if (why := verify_checkpoint(folder)) is not None:
            raise InputError(f"checkpoint {folder} cannot be used: {why}")
    else:
        found, faults = newest_valid(config.run.files.checkpoints)
        for damaged, why in faults.items():
            logger.warning(f"checkpoint {damaged} is not used: {why}")
        if found is None:
            raise InputError(
                f"no checkpoint in {config.run.files.checkpoints}: train first, with the same "
                "overrides"
            )
        folder = found
    return folder


def export_folder(config: EvaluationConfig, folder: Path) -> Path:
    """Export folder of a checkpoint: `hf` for the newest, `hf-step-N` for a requested one."""
    return (
        config.run.files.hf
        if config.run.checkpoint is None
        else config.run.files.hf_export(folder.name)
    )


def identity_of(folder: Path) -> dict[str, Any]:
    """Which checkpoint a result was made of."""
    return {
        "checkpoint": folder.name,
        "manifest_sha256": sha256_of(folder / MANIFEST),
        "tokens": read_state(folder)["tokens"],
    }


def load_model(config: EvaluationConfig, folder: Path, device: str = "cpu") -> FalconMamba:
    """The model of a checkpoint in fp32, ready to evaluate."""
    return model_from_folder(config.model, folder, torch.device(device))


def best_device() -> str:
    """Where one process computes fastest."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_from_folder(shape: ModelConfig, folder: Path, device: torch.device) -> FalconMamba:
    """The model of a checkpoint folder in fp32 on a device."""
    reader, kernels = CheckpointReader(folder), kernels_of(Backend.auto, device.type)
    with torch.device("meta"):
        model = FalconMamba(shape, kernels)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read_full("param", name))
    return model.eval()


@dataclass(frozen=True)
class Subject:
    """What a suite scores; `identity` says so in its results, which lie in the folder `results`."""

    folder: Path
    results: Path
    identity: dict[str, Any]
    tokenizer: Path | None  # None: the folder is a Hugging Face one and brings its own

    @property
    def name(self) -> str:
        """Short name for tables and files."""
        return self.folder.name


def subject_of(config: EvaluationConfig) -> Subject:
    """Resolve run.checkpoint, else the run's newest; its config.yaml locates the vocabulary."""
    named = config.run.checkpoint
    if named is not None and (Path(named) / "config.json").is_file():
        folder = Path(named).resolve()
        try:
            HfFolder(folder)
        except ValueError as error:
            raise InputError(str(error)) from error
        files = {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))}
        return Subject(
            folder, config.run.files.scores, {"folder": str(folder), "files": files}, None
        )
    folder = verified_checkpoint(config)
    tokenizer = tokenizer_path(config.data)
    if (record := config.run.files.config).is_file():
        tokenizer = tokenizer_path(
            replace(config.data, folder=str(load_config(record).data.folder))
        )
    return Subject(folder, config.run.files.scores, identity_of(folder), tokenizer)
