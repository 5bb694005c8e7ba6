"""Whoever else reads the export: mamba-ssm's names by way of mambapy, llama.cpp's name table, the
hub.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from mambapy.mamba import Mamba, MambaConfig

from core.errors import InputError
from eval.config import EvaluationConfig
from eval.export import export
from eval.hf.card import model_card
from eval.model_source import find_checkpoint
from eval.push import push
from eval.run import run_evaluation
from model.hf import tensor_names, to_hf
from tests.compose import run_config
from tests.tiny import TINY, model_of


def test_mamba_ssm_names() -> None:
    """mambapy's layers are named as mamba-ssm's, which are transformers' names; loaded with ours,
    it gives our logits.

    mambapy has one eps for all norms and weights of one in the inner ones, so the model here has
    one eps too.
    """
    shape = replace(TINY, mixer_norm_eps=TINY.norm_eps)
    model = model_of(shape, seed=5)
    theirs = {t: to_hf(o, model.get_parameter(o).detach()) for o, t in tensor_names(shape.n_layer)}
    other = Mamba(MambaConfig(d_model=24, n_layers=2, d_state=6, dt_rank=5, inner_layernorms=True))
    layers = {
        name.removeprefix("backbone."): x
        for name, x in theirs.items()
        if name.startswith("backbone.layers.")
    }
    result = other.load_state_dict(layers, strict=False)
    assert not result.unexpected_keys and all("layernorm" in name for name in result.missing_keys)
    tokens = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        hidden = other(F.embedding(tokens, theirs["backbone.embeddings.weight"]))
        normed = F.rms_norm(hidden, (24,), theirs["backbone.norm_f.weight"], shape.norm_eps)
        logits = F.linear(normed, theirs["lm_head.weight"])
        torch.testing.assert_close(logits, model.logits(tokens), rtol=1e-4, atol=1e-5)


def test_llama_cpp_names() -> None:
    """gguf, the part of llama.cpp's converter that PyPI carries, knows every tensor and needs no
    other.
    """
    layers = 64
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, layers)
    mapped = [
        table.get_name(theirs, try_suffixes=(".weight", ".bias"))
        for _, theirs in tensor_names(layers)
    ]
    assert None not in mapped and len(set(mapped)) == 643
    kinds = {
        str(name).split(".", 2)[-1] if str(name).startswith("blk") else str(name) for name in mapped
    }
    assert {
        "ssm_a",
        "ssm_d",
        "ssm_in.weight",
        "ssm_conv1d.bias",
        "ssm_dt.bias",
        "token_embd.weight",
        "output.weight",
    } <= kinds
    # how it says that this is Falcon's Mamba
    assert gguf.Keys.SSM.DT_B_C_RMS == "{arch}.ssm.dt_b_c_rms"


class Hub:
    """Stands in for the hub: no network in tests."""

    calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append(
            (name, {"arguments": arguments, **named})
        )


def test_push_uploads_the_checked_export_with_a_card(
    config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("eval.push.HfApi", Hub)
    with pytest.raises(InputError, match="export.hub=USER/MODEL"):
        push(config)
    ready = replace(config, export=replace(config.export, hub="me/falcon"))
    with pytest.raises(InputError, match="eval/export.py"):
        push(ready)
    export(config)
    run_evaluation(config)
    whole = run_config("demo")
    record = {
        **json.loads(json.dumps(asdict(whole), default=lambda value: value.value)),
        "run": asdict(config.run),
    }
    (config.run.folder / "config.yaml").write_text(json.dumps(record))  # JSON is YAML
    step = find_checkpoint(config).name
    scores = config.run.folder / "scores"
    scores.mkdir()
    rows = {"ARC": {"score": 12.345, "stderr": 0.5}}
    (scores / "a.json").write_text(
        json.dumps({"checkpoint": step, "suite": "leaderboard_v1", "rows": rows})
    )
    (scores / "b.json").write_text(
        json.dumps({"checkpoint": "step-1", "suite": "of another step", "rows": rows})
    )
    push(ready)
    names = [name for name, _ in Hub.calls]
    assert names == ["create_repo", "upload_folder", "upload_file"]
    assert (
        Hub.calls[0][1]["private"] is True and Hub.calls[1][1]["folder_path"] == config.run.files.hf
    )
    card = (config.run.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "PSF-2.0" in card
    assert (
        "| decay | 400,000 | 256 |" in card
        and "| ARC | 12.35 | 0.50 |" in card
        and "another step" not in card
    )
    heldout = json.loads((config.run.folder / "eval.json").read_text())["heldout"]["all"]
    assert f"{heldout['bits_per_byte']:.3f}" in card and "0.004, 1.5625e-05" in card
    results = ModelCard(card).data.eval_results  # what the hub shows beside the text
    assert [row.metric_value for row in results if row.metric_type == "leaderboard_v1"] == [12.345]
    assert heldout["bits_per_byte"] in [row.metric_value for row in results]


def test_a_card_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.yaml"):
        model_card(tmp_path, tmp_path, TINY)
