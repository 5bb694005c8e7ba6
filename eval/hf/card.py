"""A model card out of a run's own files: config.yaml, metrics.jsonl, eval.json and scores/."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from core.errors import InputError
from core.files import read_json
from core.old_keys import load_config
from core.run import RunFiles
from model.checkpoint import read_state
from model.config import ModelConfig
from model.flops import parameter_count

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [falcon_mamba, mamba, state-space-model, pretrained]
---
"""


def model_card(run: Path, step: Path, shape: ModelConfig) -> str:
    """README.md of an exported checkpoint folder `step` of a run: data, recipe, results, curves.

    What the run did not record (scores that were not taken) is left out. Raises InputError without
    config.yaml.
    """
    files = RunFiles(run)
    if not files.config.is_file():
        raise InputError(f"{run} holds no config.yaml: it is written by train/pretrain.py")
    config: Any = OmegaConf.to_container(load_config(files.config))
    state = read_state(step)
    parts = [
        HEAD,
        f"# {config['run']['name']}\n",
        f"A Falcon Mamba (arXiv 2410.05355) of {parameter_count(shape):,} parameters after "
        f"{state['tokens']:,} tokens ({step.name}). Load it with "
        "`AutoModelForCausalLM.from_pretrained`.\n",
        *_data(config["data"]),
        *_recipe(config, shape),
        *_results(run, step),
    ]
    if files.curves.is_file():
        parts += ["## Curves\n", "![loss, rate, batch and context over tokens](curves.png)\n"]
    return "\n".join(parts)


def _rows(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _data(data: Any) -> list[str]:
    sources = [[name, s["recipe"], s["licence"]] for name, s in data["sources"].items()]
    stages = []
    for stage in data["stages"]:
        whole = sum(stage["mixture"].values())
        shares = ", ".join(
            f"{name} {100 * share / whole:.0f} %" for name, share in stage["mixture"].items()
        )
        stages.append([stage["name"], f"{stage['tokens']:,}", f"{stage['seq_len']:,}", shares])
    return [
        "## Data\n",
        _rows(["source", "recipe", "licence"], sources),
        _rows(["stage", "tokens", "context", "mixture"], stages),
        f"State is {'' if data['reset_state'] else 'not '}reset between packed documents.\n",
    ]


def _recipe(config: Any, shape: ModelConfig) -> list[str]:
    schedule, optim = config["schedule"], config["optim"]
    rows = [
        [
            "layers, width, inner, state",
            f"{shape.n_layer}, {shape.d_model}, {shape.d_inner}, {shape.d_state}",
        ],
        ["peak and final rate", f"{optim['lr']:g}, {schedule['min_lr']:g}"],
        ["warmup, decay, tokens", f"{schedule['warmup_tokens']:,}, {schedule['decay_tokens']:,}"],
        [
            "batch, sequences",
            f"{schedule['batch_start_sequences']} to {schedule['batch_end_sequences']} in "
            f"{schedule['ramp_tokens']:,} tokens",
        ],
        [
            "AdamW",
            f"{optim['beta1']}, {optim['beta2']}, {optim['eps']:g}, weight decay "
            f"{optim['weight_decay']}",
        ],
        ["gradient clipping", optim["clip_norm"]],
        ["precision", config["compute"]["precision"]],
        ["seeds of weights and data", f"{config['run']['seed']}, {config['data']['seed']}"],
    ]
    return ["## Recipe\n", _rows(["what", "value"], rows)]


def _results(run: Path, step: Path) -> list[str]:
    """Held-out bits per byte and leaderboards of this very checkpoint."""
    parts: list[str] = []
    heldout = read_json(RunFiles(run).evaluation)
    if heldout.get("checkpoint") == step.name:
        rows = [
            [name, f"{s['loss']:.3f}", f"{s['bits_per_byte']:.3f}"]
            for name, s in heldout["heldout"].items()
        ]
        parts.append(_rows(["held-out source", "nats per token", "bits per byte"], rows))
    for path in sorted(RunFiles(run).scores.glob("*.json")):
        result = read_json(path)
        if result.get("checkpoint") == step.name:
            rows = [
                [label, f"{r['score']:.2f}", _error(r["stderr"])]
                for label, r in result["rows"].items()
            ]
            parts.append(_rows([result["suite"], "score", "standard error"], rows))
    return ["## Results\n", *parts] if parts else []


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
