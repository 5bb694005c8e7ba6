"""Model card from a run's own files: config.yaml, eval.json and scores/."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import UndefinedError
from tokenizers import Tokenizer

from core.errors import InputError
from core.old_keys import read_record
from core.records import read_if_present
from core.run import RunFiles
from core.templates import render
from eval.heldout import HeldoutRecord
from eval.hf.llama_cpp import CONVERTER, eps_difference, obstacles
from eval.leaderboard.stored import StoredSuite
from model.checkpoint import read_state
from model.config import ModelConfig
from model.flops import parameter_count

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TASK = "text-generation"
FIX = "restore it, or remove it and evaluate again"


def model_card(
    run_dir: Path, checkpoint: Path, model: ModelConfig, tokenizer: Tokenizer, curves: bool = False
) -> str:
    """Render the README.md of an exported checkpoint: serving, data, recipe, results and curves.

    Leaves out what the run did not record, and data and recipe without a config. `curves` says that
    curves.png is beside the card. Raises InputError for a damaged file.
    """
    files = RunFiles(run_dir)
    config = read_record(files.config) if files.config.is_file() else {}
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
        name = config.get("run", {}).get("name") or run_dir.name
        data = ModelCardData(
            library_name="transformers",
            pipeline_tag=TASK,
            tags=["falcon_mamba", "mamba", "state-space-model", "pretrained"],
            # eval_results needs it
            model_name=name if results else None,
            eval_results=results or None,
        )
        text = render(
            TEMPLATE,
            card_data=data.to_yaml(),
            name=name,
            config=config,
            model=model,
            parameters=parameter_count(model),
            tokens=state["tokens"],
            history=history,
            step=checkpoint.name,
            heldout=heldout,
            suites=suites,
            curves=curves,
            converter=CONVERTER,
            obstacles=obstacles(model, tokenizer),
            eps_difference=eps_difference(model),
        )
    except (UndefinedError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
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
