"""Other readers of the export: mambapy (mamba-ssm's names), llama.cpp's name table, the hub."""

import json
from dataclasses import asdict, replace
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
from eval.model_source import find_checkpoint
from eval.push import push
from eval.run import run_evaluation
from model.hf import tensor_names, to_hf
from tests.compose import run_config
from tests.tiny import TINY, model_of


def test_mambapy_computes_the_same_logits() -> None:
    """mambapy's layers have mamba-ssm's names, which are also transformers' names.

    mambapy has one eps for all norms, so the model of this test has one eps too. The weights of its
    inner norms are ones.
    """
    config = replace(TINY, mixer_norm_eps=TINY.norm_eps)
    model = model_of(config, seed=5)
    hf_tensors = {
        hf_name: to_hf(name, model.get_parameter(name).detach())
        for name, hf_name in tensor_names(config.n_layer)
    }
    mambapy = Mamba(
        MambaConfig(d_model=24, n_layers=2, d_state=6, dt_rank=5, inner_layernorms=True)
    )
    layers = {
        name.removeprefix("backbone."): x
        for name, x in hf_tensors.items()
        if name.startswith("backbone.layers.")
    }
    result = mambapy.load_state_dict(layers, strict=False)
    assert not result.unexpected_keys and all("layernorm" in name for name in result.missing_keys)
    tokens = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        hidden = mambapy(F.embedding(tokens, hf_tensors["backbone.embeddings.weight"]))
        normed = F.rms_norm(hidden, (24,), hf_tensors["backbone.norm_f.weight"], config.norm_eps)
        logits = F.linear(normed, hf_tensors["lm_head.weight"])
        torch.testing.assert_close(logits, model.logits(tokens), rtol=1e-4, atol=1e-5)


def test_llama_cpp_knows_every_tensor() -> None:
    """The name table of gguf, llama.cpp's package on PyPI, maps each of our tensors to its own."""
    layers = 64
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, layers)
    mapped = [
        table.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        for _, hf_name in tensor_names(layers)
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
    # the key that marks Falcon Mamba
    assert gguf.Keys.SSM.DT_B_C_RMS == "{arch}.ssm.dt_b_c_rms"


class FakeHub:
    """Records the calls to HfApi; tests have no network."""

    calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append(
            (name, {"arguments": arguments, **named})
        )


def test_push_uploads_the_export_and_a_model_card(
    config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("eval.push.HfApi", FakeHub)
    with pytest.raises(InputError, match="export.hub=USER/MODEL"):
        push(config)
    with_hub = replace(config, export=replace(config.export, hub="me/falcon"))
    with pytest.raises(InputError, match="eval/export.py"):
        push(with_hub)
    export(config)
    assert "Results" not in (config.run.files.hf / "README.md").read_text()
    with pytest.raises(InputError, match="has no config.yaml"):
        push(with_hub)
    run_evaluation(config)
    demo = run_config("demo")
    record = {
        **json.loads(json.dumps(asdict(demo), default=lambda value: value.value)),
        "run": asdict(config.run),
    }
    (config.run.folder / "config.yaml").write_text(json.dumps(record))  # JSON is YAML
    step = find_checkpoint(config).name
    scores = config.run.folder / "scores"
    scores.mkdir()
    rows = {"ARC": {"row": {}, "score": 12.345, "stderr": 0.5}}
    (scores / "a.json").write_text(
        json.dumps({"checkpoint": step, "suite": "leaderboard_v1", "complete": True, "rows": rows})
    )
    (scores / "b.json").write_text(
        json.dumps(
            {"checkpoint": "step-1", "suite": "of another step", "complete": True, "rows": rows}
        )
    )
    push(with_hub)
    names = [name for name, _ in FakeHub.calls]
    assert names == ["create_repo", "upload_folder", "upload_file"]
    assert FakeHub.calls[0][1]["private"] is True
    assert FakeHub.calls[1][1]["folder_path"] == config.run.files.hf
    assert "README.md" in FakeHub.calls[1][1]["ignore_patterns"]
    card = (config.run.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "PSF-2.0" in card
    assert "| decay | 400,000 | 256 |" in card and "| ARC | 12.35 | 0.50 |" in card
    assert "another step" not in card
    heldout = json.loads((config.run.folder / "eval.json").read_text())["heldout"]["all"]
    assert f"{heldout['bits_per_byte']:.3f}" in card and "0.004, 1.5625e-05" in card
    results = ModelCard(card).data.eval_results  # the hub shows these beside the text
    assert [row.metric_value for row in results if row.metric_type == "leaderboard_v1"] == [12.345]
    assert heldout["bits_per_byte"] in [row.metric_value for row in results]
