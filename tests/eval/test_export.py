"""Export and evaluation on a small checkpoint with a real vocabulary."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.errors import InputError
from core.run import Run
from data.stream.manifests import DTYPE, open_manifests, source_folder, tokenizer_path
from data.tokenizer import EOS
from data.tokenizer import load as load_tokenizer
from eval.config import EvaluationConfig
from eval.export import entries, export
from eval.heldout import evaluate, unigram_bits
from eval.hf.compare import compare, compare_by_layer
from eval.model_source import find_checkpoint, load_model
from eval.run import combine_scores, generate, run_evaluation
from model.checkpoint import CheckpointReader
from model.hf import hf_config
from model.mamba import FalconMamba
from tests.eval.conftest import MODEL


@pytest.fixture(scope="module")
def exported(config: EvaluationConfig) -> Path:
    export(config, max_bytes=40_000)
    return config.run.files.hf


def test_the_folder_has_the_published_layout(exported: Path, config: EvaluationConfig) -> None:
    written = json.loads((exported / "config.json").read_text())
    assert written["tie_word_embeddings"] is False and written["mixer_rms_eps"] == 1e-6
    assert written["expand"] == 2 and written["intermediate_size"] == 48
    assert written["eos_token_id"] == written["bos_token_id"] == written["pad_token_id"] == EOS
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total_size = 0
    for name in files:
        with safe_open(exported / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
        total_size += sum(sizes)
        assert sum(sizes) <= 40_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == total_size
    assert not list(exported.glob("part-*")) and not (config.run.folder / "hf.part").exists()


def test_transformers_gives_our_logits_and_its_cache_path_too(
    exported: Path, config: EvaluationConfig
) -> None:
    ours = load_model(config, find_checkpoint(config))
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    tokens = torch.randint(12, 280, (1, 9))
    with torch.no_grad():
        expected = ours.logits(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        cache, steps = None, []
        for t in range(tokens.shape[1]):
            out = theirs(tokens[:, t : t + 1], cache_params=cache, use_cache=True)
            cache = out.cache_params
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-5)


def test_the_tokenizer_loads_and_generates(exported: Path, config: EvaluationConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (
        tokenizer.eos_token_id == EOS
        and tokenizer.decode(tokenizer("def f3").input_ids) == "def f3"
    )
    assert generate(exported, config.generate).startswith("def f")


def test_bfloat16_export_agrees_with_rounded_weights(
    config: EvaluationConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").parent.mkdir(parents=True)
    (folder / "checkpoints").symlink_to(config.run.files.checkpoints)
    bf16 = replace(
        config, run=Run("bf16", str(folder), 0), export=replace(config.export, dtype="bfloat16")
    )
    export(bf16)
    assert AutoModelForCausalLM.from_pretrained(folder / "hf").dtype == torch.bfloat16


def test_a_wrong_export_is_caught(
    config: EvaluationConfig, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "eval.export.to_hf", lambda name, x: x.unsqueeze(1) * 1.01 if "conv_weight" in name else x
    )
    (config.run.folder / "export.json").unlink()
    before = (config.run.files.hf / "config.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="logits differ"):
        export(config)
    assert (config.run.files.hf / "config.json").stat().st_mtime_ns == before


def test_plain_mamba_has_no_such_folder() -> None:
    with pytest.raises(ValueError, match="mixer_norms"):
        hf_config(replace(MODEL, mixer_norms=False), EOS, "float32")
    with pytest.raises(ValueError, match="no multiple"):
        hf_config(replace(MODEL, d_inner=50), EOS, "float32")


def test_bits_per_byte(config: EvaluationConfig) -> None:
    """Of a model that knows nothing: ln(vocab) nats a token, over the bytes that those tokens
    are.
    """
    model: FalconMamba = load_model(config, find_checkpoint(config))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    manifests = open_manifests(config.data)
    scores = dict(evaluate(model, config.data, manifests, seq_len=16, batch_size=3, max_tokens=500))
    tokenizer = load_tokenizer(tokenizer_path(config.data))
    for name, score in scores.items():
        folder = source_folder(config.data, name)
        files = manifests[name].splits["heldout"]
        ids = np.concatenate([np.fromfile(folder / file.name, DTYPE) for file in files]).astype(
            int
        )[1:501]
        # byte level: a character stands for a byte
        size = sum(len(tokenizer.id_to_token(i)) for i in ids if i > EOS)
        assert score.tokens == 500 and score.bytes == size
        assert score.loss == pytest.approx(math.log(288), rel=1e-5)
        assert score.bits_per_byte == pytest.approx(500 * math.log2(288) / size, rel=1e-5)
        counts = np.bincount(ids)
        entropy = -sum(c * math.log2(c / 500) for c in counts if c)
        assert score.unigram_bits_per_byte == pytest.approx(entropy / size)
    everything = combine_scores(list(scores.values()))
    assert everything.tokens == 1000 and everything.loss == pytest.approx(math.log(288), rel=1e-5)


def test_windows_cover_every_token_once(config: EvaluationConfig) -> None:
    """The score does not depend on how many windows are taken at once."""
    model = load_model(config, find_checkpoint(config))
    one, many = (
        dict(evaluate(model, config.data, open_manifests(config.data), 16, batch, max_tokens=333))
        for batch in (1, 7)
    )
    assert all(one[name].loss == pytest.approx(many[name].loss, rel=1e-6) for name in one)
    assert unigram_bits(torch.tensor([3, 3, 4, 4])) == pytest.approx(4.0)


def test_errors_name_the_fix(config: EvaluationConfig) -> None:
    with pytest.raises(InputError, match="train first"):
        find_checkpoint(replace(config, run=Run("x", "/nonexistent", 0)))
    with pytest.raises(InputError, match="keep_fp32 names Alog; parameters end in A_log"):
        list(entries(replace(config, export=replace(config.export, keep_fp32=["Alog"]))))
    with pytest.raises(InputError, match="manifest.json is missing"):
        find_checkpoint(replace(config, run=replace(config.run, checkpoint="/nonexistent")))


def test_results_are_reused_only_while_they_hold(
    config: EvaluationConfig, exported: Path, capsys: Any
) -> None:
    export(config, max_bytes=40_000)
    run_evaluation(config)
    run_evaluation(config)
    assert "reused" in capsys.readouterr().out.splitlines()[-1]
    # another way to read the same text
    run_evaluation(replace(config, data=replace(config.data, reset_state=False)))
    assert "reused" not in capsys.readouterr().out.splitlines()[-1]
    (config.run.folder / "eval.json").write_text('{"checkp')  # cut short
    run_evaluation(config)
    weights = next(exported.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="eval/export.py"):
        run_evaluation(config)
    export(config, max_bytes=40_000)
    assert "reused" not in capsys.readouterr().out.splitlines()[-1]
    run_evaluation(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_by_layer_finds_what_whole_models_find(
    config: EvaluationConfig,
    tmp_path: Path,
    dtype: str,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without memory for two models the comparison goes by layers, agrees as closely, and catches a
    wrong layer.
    """
    (tmp_path / "checkpoints").symlink_to(config.run.files.checkpoints)
    settings = replace(config.export, dtype=dtype, keep_fp32=["A_log"])
    here = replace(config, run=Run("layers", str(tmp_path), 0), export=settings)
    monkeypatch.setattr("eval.export.COMPARE_BYTES", 1 << 40)
    export(here)
    assert "layer by layer" in capsys.readouterr().out
    reader = CheckpointReader(find_checkpoint(here))
    difference = compare_by_layer(here.run.files.hf, reader, MODEL, entries(here))
    whole = compare(here.run.files.hf, load_model(here, find_checkpoint(here)), entries(here))
    assert difference < 1e-5 and whole < 1e-5
    wrong = CheckpointReader.read_rows
    monkeypatch.setattr(
        CheckpointReader,
        "read_rows",
        lambda p, k, n, a, b: wrong(p, k, n, a, b) * (1.01 if "1.mixer.D" in n else 1),
    )
    assert compare_by_layer(here.run.files.hf, reader, MODEL, entries(here)) > 1e-4


def test_a_logit_that_is_not_a_number_is_caught(
    config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.export.compare", lambda *arguments: float("nan"))
    (config.run.folder / "export.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="logits differ"):
        export(config)
