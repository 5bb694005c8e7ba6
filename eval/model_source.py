"""Find and load the model to evaluate: a run's checkpoint or a Hugging Face folder."""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core.errors import InputError
from core.files import sha256_of
from core.old_keys import load_config
from core.run import MANIFEST, Run, RunFiles, iter_checkpoints
from data.stream.manifests import tokenizer_path
from data.tokenizer import FILE
from data.tokenizer import load as load_tokenizer
from data.vocabulary import TOKENIZER_CONFIG, required_vocab_size
from eval.config import EvaluationConfig
from eval.hf.exported import check_if_export
from eval.short_keys import run_folder
from model.checkpoint import newest_valid, read_state
from model.hf import HF_CONFIG, HfFolder
from model.mamba import FalconMamba
from model.pretrained import checkpoint_weights

logger = logging.getLogger(__name__)


def find_checkpoint(config: EvaluationConfig) -> Path:
    """Return run.checkpoint if it is set, else the newest valid checkpoint.

    Raises InputError when there is none or its model is not the config's.
    """
    folder = verified_checkpoint(config.run)
    if read_state(folder)["model"] != asdict(config.model):
        raise InputError(
            f"the model in {folder} is not the config's: give the overrides it was trained with"
        )
    return folder


def verified_checkpoint(run: Run) -> Path:
    """Find a checkpoint as find_checkpoint does, without comparing its model with the config.

    run.checkpoint may also be a run's folder, for its newest valid checkpoint.
    """
    requested = None if run.checkpoint is None else Path(run.checkpoint)
    checkpoints: Iterable[Path]
    if requested is None:
        checkpoints = iter_checkpoints(run.files.checkpoints)
    elif RunFiles(requested).checkpoints.is_dir():
        checkpoints = iter_checkpoints(RunFiles(requested).checkpoints)
    else:
        checkpoints = [requested]
    newest, errors = newest_valid(checkpoints)
    if newest is None and requested is not None:
        reason = next(iter(errors.values()), "the run has none")
        raise InputError(f"cannot use checkpoint {requested}: {reason}")
    for damaged, error in errors.items():
        logger.warning(f"skipping checkpoint {damaged}: {error}")
    if newest is None:
        raise InputError(
            f"no checkpoint in {run.files.checkpoints}: train first, with the same overrides"
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


def load_any(run: Run, device: str) -> tuple[FalconMamba, Path]:
    """Load the model that run.checkpoint names, a transformers folder too, and find its tokenizer.

    Raises InputError if either is missing or does not belong to the other.
    """
    if run.checkpoint is not None and (Path(run.checkpoint) / HF_CONFIG).is_file():
        folder = Path(run.checkpoint)
        check_if_export(folder)
        model, tokenizer = FalconMamba.from_pretrained(folder, device=device), folder / FILE
        if not tokenizer.is_file():
            raise InputError(
                f"no tokenizer in {folder}: copy the model's {FILE} and {TOKENIZER_CONFIG} there"
            )
    else:
        folder = verified_checkpoint(run)
        tokenizer = tokenizer_of(folder, run_folder(folder.resolve()))
        model = load_model(folder, device)
    highest = required_vocab_size(load_tokenizer(tokenizer)) - 1
    if highest >= model.config.vocab_size:
        raise InputError(
            f"{tokenizer} has ids up to {highest}, the model in {folder} has "
            f"{model.config.vocab_size}: put the model's own {FILE} there"
        )
    return model.eval(), tokenizer


def tokenizer_of(checkpoint: Path, run: Path) -> Path:
    """The tokenizer that a checkpoint was trained with: of its run's data, else of an export."""
    files, trained_with = RunFiles(run), read_state(checkpoint)["tokenizer"]
    exported = [files.hf / FILE, files.hf_export(checkpoint.name) / FILE]
    prepared = None
    if files.config.is_file():
        prepared = tokenizer_path(load_config(files.config).data)
        if prepared.is_file() and trained_with in ("", sha256_of(prepared)):
            return prepared
    for path in exported:
        if path.is_file():
            return path
    if prepared is None:
        reason = f"{run} has no {files.config.name} that names its data"
    elif prepared.is_file():
        reason = f"{prepared} is another than it was trained with"
    else:
        reason = f"there is none at {prepared}"
    raise InputError(
        f"no tokenizer for {checkpoint} ({reason}): copy its {FILE} and {TOKENIZER_CONFIG} to "
        f"{prepared.parent if prepared else files.hf}"
    )


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
    folder = verified_checkpoint(config.run)
    tokenizer = tokenizer_path(config.data)
    if (config_file := config.run.files.config).is_file():
        data_folder = str(load_config(config_file).data.folder)
        tokenizer = tokenizer_path(replace(config.data, folder=data_folder))
    return ModelSource(folder, config.run.files.scores, checkpoint_provenance(folder), tokenizer)
