"""Find and load the model to evaluate: a run's checkpoint or a Hugging Face folder."""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core.errors import InputError
from core.files import sha256_of
from core.old_keys import load_config
from core.run import MANIFEST, iter_checkpoints
from data.stream.manifests import tokenizer_path
from eval.config import EvaluationConfig
from eval.hf.exported import check_if_export
from model.checkpoint import newest_valid, read_state, verify_checkpoint
from model.hf import HfFolder
from model.mamba import FalconMamba
from model.pretrained import checkpoint_weights

logger = logging.getLogger(__name__)


def find_checkpoint(config: EvaluationConfig) -> Path:
    """Return run.checkpoint if it is set, else the newest valid checkpoint.

    Raises InputError when there is none or its model is not the config's.
    """
    folder = verified_checkpoint(config)
    if read_state(folder)["model"] != asdict(config.model):
        raise InputError(
            f"the model in {folder} is not the config's: give the overrides it was trained with"
        )
    return folder


def verified_checkpoint(config: EvaluationConfig) -> Path:
    """Find a checkpoint as find_checkpoint does, without comparing its model with the config."""
    if config.run.checkpoint is not None:
        folder = Path(config.run.checkpoint)
        if (error := verify_checkpoint(folder)) is not None:
            raise InputError(f"cannot use checkpoint {folder}: {error}")
        return folder
    newest, errors = newest_valid(iter_checkpoints(config.run.files.checkpoints))
    for damaged, error in errors.items():
        logger.warning(f"skipping checkpoint {damaged}: {error}")
    if newest is None:
        raise InputError(
            f"no checkpoint in {config.run.files.checkpoints}: train first, with the same overrides"
        )
    return newest


def export_folder(config: EvaluationConfig, checkpoint: Path) -> Path:
    """Export folder of a checkpoint: `hf` for the newest, `hf-step-N` for a requested one."""
    if config.run.checkpoint is None:
        return config.run.files.hf
    return config.run.files.hf_export(checkpoint.name)


def checkpoint_provenance(folder: Path) -> dict[str, Any]:
    """Name, manifest hash and tokens of a checkpoint, stored with the results made from it."""
    return {
        "checkpoint": folder.name,
        "manifest_sha256": sha256_of(folder / MANIFEST),
        "tokens": read_state(folder)["tokens"],
    }


def load_model(folder: Path, device: str = "cpu") -> FalconMamba:
    """Load the fp32 model of a verified checkpoint in eval mode."""
    return FalconMamba.from_weights(checkpoint_weights(folder), device).eval()


def best_device() -> str:
    """Return "cuda" if a GPU is available, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class ModelSource:
    """The model that a suite scores."""

    folder: Path
    results_dir: Path
    provenance: dict[str, Any]  # stored in the results
    tokenizer: Path | None  # None for a Hugging Face folder, which contains its own

    @property
    def name(self) -> str:
        """Short name for tables and files."""
        return self.folder.name


def find_model(config: EvaluationConfig) -> ModelSource:
    """Resolve run.checkpoint, else the run's newest checkpoint.

    The tokenizer comes from the data folder that the run's config.yaml names.
    """
    requested = config.run.checkpoint
    if requested is not None and (Path(requested) / "config.json").is_file():
        folder = Path(requested).resolve()
        check_if_export(folder)
        try:
            HfFolder(folder)
        except ValueError as error:
            raise InputError(str(error)) from error
        hashes = {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))}
        return ModelSource(
            folder,
            config.run.files.scores,
            provenance={"folder": str(folder), "files": hashes},
            tokenizer=None,
        )
    folder = verified_checkpoint(config)
    tokenizer = tokenizer_path(config.data)
    if (config_file := config.run.files.config).is_file():
        data_folder = str(load_config(config_file).data.folder)
        tokenizer = tokenizer_path(replace(config.data, folder=data_folder))
    return ModelSource(folder, config.run.files.scores, checkpoint_provenance(folder), tokenizer)
