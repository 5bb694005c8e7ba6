"""Model card from a run's own files: config.yaml, eval.json and scores/."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import UndefinedError

from core.errors import InputError
from core.old_keys import read_record
from core.records import read_if_present
from core.run import RunFiles
from core.templates import render
from eval.config import EvaluationConfig
from eval.heldout import HeldoutRecord
from eval.hf.exported import CARD_MARK
from eval.leaderboard.stored import StoredSuite
from model.checkpoint import read_state
from model.config import ModelConfig
from model.flops import parameter_count

USE = Path(__file__).with_name("use.md.jinja")
TEMPLATE = Path(__file__).with_name("card.md.jinja")
TASK = "text-generation"
# of settings that an older config.yaml lacks, or that someone has changed
CARD_ERRORS = (
    *(UndefinedError, KeyError, TypeError),
    *(ValueError, AttributeError, ArithmeticError),
)
FIX = "restore it, or remove it and evaluate again"


def llama_cpp_limits(model: ModelConfig, trained_here: bool) -> list[str]:
    """What llama.cpp cannot do with an export, a line each."""
    limits = []
    if trained_here:
        limits.append(
            "llama.cpp's converter knows vocabularies of released models by their hashes. This one "
            'was trained here: it stops with "BPE pre-tokenizer was not recognized".'
        )
    if model.norm_eps != model.mixer_norm_eps:
        limits.append(
            f"llama.cpp has one eps, {model.norm_eps:g}, also for the norms of dt, B and C, which "
            f"have {model.mixer_norm_eps:g} here: its logits differ by some thousandths of their "
            "deviation."
        )
    return limits


def use_section(model: ModelConfig, trained_here: bool) -> str:
    """The part of a card that says how to load the model."""
    limits = llama_cpp_limits(model, trained_here)
    return render(USE, limits=limits, mark=CARD_MARK).strip()


def export_card(config: EvaluationConfig, checkpoint: Path) -> str:
    """The README.md of an export; without its run's config.yaml only how to load it."""
    if config.run.files.config.is_file():
        return model_card(config.run.folder, checkpoint, config.model)
    use = use_section(config.model, config.data.tokenizer.path is None)
    return f"# {checkpoint.name}\n\n{use}\n"


def model_card(run_dir: Path, checkpoint: Path, model: ModelConfig) -> str:
    """Render the README.md of an exported checkpoint: data, recipe, results and curves.

    Leaves out scores that the run did not record. Raises InputError without config.yaml, and for a
    damaged file.
    """
    files = RunFiles(run_dir)
    if not files.config.is_file():
        raise InputError(f"{run_dir} has no config.yaml: train/pretrain.py writes it")
    config = read_record(files.config)
    state = read_state(checkpoint)
    history = starts_of(config.pop("history", None) or [], state["tokens"])
    # what the checkpoint was trained with; config.yaml may be of a later start
    config = state.get("config") or config
    evaluation = read_if_present(files.evaluation, HeldoutRecord, FIX, extra="ignore")
    heldout = {}
    if evaluation is not None and evaluation["checkpoint"] == checkpoint.name:
        heldout = evaluation["heldout"]
    stored = [
        read_if_present(path, StoredSuite, FIX, extra="ignore")
        for path in sorted(files.scores.glob("*.json"))
        if path != files.score_jobs
    ]
    suites = [suite for suite in stored if suite and suite.get("checkpoint") == checkpoint.name]
    results = [
        EvalResult(TASK, name, f"{name}, held out", "bits_per_byte", row.bits_per_byte)
        for name, row in heldout.items()
    ]
    for suite in suites:
        for label, row in suite["rows"].items():
            results.append(EvalResult(TASK, label, label, suite["suite"], row["score"]))
    try:
        data = ModelCardData(
            library_name="transformers",
            pipeline_tag=TASK,
            tags=["falcon_mamba", "mamba", "state-space-model", "pretrained"],
            # eval_results needs it
            model_name=config.get("run", {}).get("name") if results else None,
            eval_results=results or None,
        )
        text = render(
            TEMPLATE,
            card_data=data.to_yaml(),
            config=config,
            model=model,
            parameters=parameter_count(model),
            tokens=state["tokens"],
            history=history,
            step=checkpoint.name,
            heldout=heldout,
            suites=suites,
            curves=files.curves.is_file(),
            use=use_section(model, config["data"]["tokenizer"]["path"] is None),
        )
    except CARD_ERRORS as error:
        raise InputError(f"{files.config} lacks settings of a run ({error}): restore it") from error
    return str(ModelCard(text))


def starts_of(history: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The starts that a checkpoint at `tokens` comes from: a later one may repeat an earlier one's
    tokens, and a first one changes nothing.
    """
    starts: list[dict[str, Any]] = []
    for entry in history:
        starts = [start for start in starts if start["tokens"] < entry["tokens"]]
        starts.append(entry if entry["tokens"] else {**entry, "decisive": {}})
    return [start for start in starts if start["tokens"] < tokens]
