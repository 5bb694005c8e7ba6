"""A model card out of a run's own files: config.yaml, eval.json and scores/."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from omegaconf import OmegaConf

from core.errors import InputError
from core.files import read_json
from core.old_keys import load_config
from core.run import RunFiles
from core.templates import render
from model.checkpoint import read_state
from model.config import ModelConfig
from model.flops import parameter_count

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TASK = "text-generation"


def model_card(run: Path, step: Path, shape: ModelConfig) -> str:
    """README.md of an exported checkpoint folder `step` of a run: data, recipe, results, curves.

    What the run did not record (scores that were not taken) is left out. Raises InputError without
    config.yaml.
    """
    files = RunFiles(run)
    if not files.config.is_file():
        raise InputError(f"{run} holds no config.yaml: it is written by train/pretrain.py")
    config: Any = OmegaConf.to_container(load_config(files.config))
    heldout = _of(step, files.evaluation).get("heldout", {})
    suites = [suite for path in sorted(files.scores.glob("*.json")) if (suite := _of(step, path))]
    results = [
        EvalResult(TASK, name, f"{name}, held out", "bits_per_byte", row["bits_per_byte"])
        for name, row in heldout.items()
    ]
    for suite in suites:
        for label, row in suite["rows"].items():
            results.append(EvalResult(TASK, label, label, suite["suite"], row["score"]))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["falcon_mamba", "mamba", "state-space-model", "pretrained"],
        model_name=config["run"]["name"] if results else None,  # the key of its results
        eval_results=results or None,
    )
    text = render(
        TEMPLATE,
        card_data=data.to_yaml(),
        config=config,
        shape=shape,
        parameters=parameter_count(shape),
        tokens=read_state(step)["tokens"],
        step=step.name,
        heldout=heldout,
        suites=suites,
        curves=files.curves.is_file(),
    )
    return str(ModelCard(text))


def _of(step: Path, path: Path) -> dict[str, Any]:
    """What a file of results says, if of this very checkpoint."""
    result = read_json(path)
    return result if result.get("checkpoint") == step.name else {}
