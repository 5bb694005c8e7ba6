"""Evaluate: held-out text of a run, or a leaderboard.

Held-out: writes eval.json and prints a sample of generated text. Bits per byte come from our model
and the newest checkpoint; the sample comes from transformers and the exported folder, as a user
would get it. Leaderboard: scores a step folder or a Hugging Face folder, for which no experiment is
needed, or a run's newest checkpoint.

examples:
  python eval/run.py +experiment=demo
  python eval/run.py +experiment=7b suite=leaderboard_v1
  python eval/run.py checkpoint=runs/7b/checkpoints/step-00500000 suite=leaderboard_v2
  python eval/run.py checkpoint=/models/falcon-mamba-7b suite=leaderboard_v1
"""

import hashlib
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from rich.console import Console
from rich.table import Table

from core.command import command
from core.errors import InputError
from core.files import read_json, sha256_of, write_json
from core.old_keys import format_value
from core.run import RunFiles
from data.config import DataConfig
from data.stream.manifests import MANIFEST, open_manifests, source_folder
from eval.config import EvaluationConfig, GenerateConfig
from eval.heldout import Score, evaluate
from eval.hf.exported import require_export
from eval.hf.transformers_model import load_transformers_model
from eval.leaderboard.suite import run_suite
from eval.subject import best_device, export_folder, find_checkpoint, identity_of, load_model

logger = logging.getLogger(__name__)


def evaluation(config: EvaluationConfig) -> None:
    """A suite when one is chosen, else the held-out text of every source and a sample."""
    if config.leaderboard.suite is not None:
        run_suite(config)
    else:
        heldout(config)


def heldout(config: EvaluationConfig) -> None:
    """Score the held-out text of every source, then generate."""
    folder = find_checkpoint(config)
    home = export_folder(config, folder)
    require_export(home, folder)
    made_of = {
        **identity_of(folder),
        "settings": deciding(config),
        "data": data_sha256(config.data),
    }
    path = config.run.files.evaluation
    before = read_json(path)
    if {key: before.get(key) for key in made_of} == made_of:
        show({name: Score(**score) for name, score in before["heldout"].items()}, before["sample"])
        logger.info(f"\nreused: {path}")
        return
    model = load_model(config, folder, best_device())
    scores: dict[str, Score] = {}
    settings = (config.eval.seq_len, config.eval.batch_sequences, config.eval.max_tokens)
    for name, score in evaluate(model, config.data, open_manifests(config.data), *settings):
        logger.info(
            f"{name}: {score.bits_per_byte:.3f} bits per byte over {score.tokens:,} held-out tokens"
        )
        scores[name] = score
    scores["all"] = total(list(scores.values()))
    sample = generate(home, config.generate)
    show(scores, sample)
    result = {
        **made_of,
        "heldout": {name: asdict(score) for name, score in scores.items()},
        "sample": sample,
    }
    write_json(path, result)
    logger.info(f"\nscores: {path}")


def deciding(config: EvaluationConfig) -> dict[str, Any]:
    """The settings that held-out scores and the sample follow from."""
    return {
        "eval": asdict(config.eval),
        "generate": asdict(config.generate),
        "dtype": config.export.dtype,
    }


def data_sha256(config: DataConfig) -> str:
    """SHA-256 of the held-out data: the manifests of all sources and data.reset_state."""
    manifests = [sha256_of(source_folder(config, name) / MANIFEST) for name in config.sources]
    return hashlib.sha256(json.dumps([manifests, config.reset_state]).encode()).hexdigest()


def show(scores: dict[str, Score], sample: str) -> None:
    """Scores and sample for a reader."""
    Console().print(table(scores))
    print(f"sample of the exported model:\n{sample}", flush=True)


def total(scores: list[Score]) -> Score:
    """All sources as one text."""
    if not scores:
        raise InputError(
            "no source has held-out tokens: raise data.heldout_percent and prepare the data again"
        )
    tokens, size = sum(score.tokens for score in scores), sum(score.bytes for score in scores)
    loss = sum(score.loss * score.tokens for score in scores) / tokens
    bits = sum(score.bits_per_byte * score.bytes for score in scores) / size
    unigram = sum(score.unigram_bits_per_byte * score.bytes for score in scores) / size
    return Score(tokens, size, loss, bits, unigram)


def table(scores: dict[str, Score]) -> Table:
    """Scores for a reader."""
    grid = Table("source", "tokens", "bytes", "loss", "bits per byte", "unigram")
    for name, s in scores.items():
        numbers = (f"{s.tokens:,}", f"{s.bytes:,}", f"{s.loss:.3f}", f"{s.bits_per_byte:.3f}")
        grid.add_row(name, *numbers, f"{s.unigram_bits_per_byte:.3f}")
    return grid


def generate(folder: Path, config: GenerateConfig) -> str:
    """Prompt and continuation by transformers, sampled with a fixed seed."""
    from transformers import AutoTokenizer, set_seed

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_transformers_model(folder)
    set_seed(config.sampling.seed)
    inputs = tokenizer(config.prompt, return_tensors="pt")
    chosen = config.sampling
    drawn = {
        "do_sample": True,
        "temperature": chosen.temperature,
        "top_k": chosen.top_k,
        "top_p": chosen.top_p,
    }
    settings = drawn if chosen.temperature else {"do_sample": False}
    ids = model.generate(**inputs, max_new_tokens=config.new_tokens, **settings)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def expand(arguments: list[str]) -> list[str]:
    """The command line with `checkpoint=` in Hydra's terms, and the run that a checkpoint belongs
    to.

    Hydra would take checkpoint=... as a value for the section of that name.
    """
    short = {"checkpoint": "run.checkpoint"}
    pairs = [argument.split("=", 1) for argument in arguments]
    expanded = ["=".join([short.get(key, key), *value]) for key, *value in pairs]
    given = {key: value[0] for key, *value in pairs if value}
    if "checkpoint" in given and not {"+experiment", "run.name"} & given.keys():
        folder = Path(given["checkpoint"]).resolve()
        home = folder.parent.parent
        home = home if folder.parent == RunFiles(home).checkpoints else folder.parent
        # in front, for options end the overrides
        expanded = [
            f"run.name={format_value(home.name)}",
            f"run.dir={format_value(str(home))}",
            *expanded,
        ]
    return expanded


main = command(EvaluationConfig)(evaluation)

if __name__ == "__main__":
    sys.argv[1:] = expand(sys.argv[1:])
    main()
