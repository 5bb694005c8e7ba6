"""Export and evaluation on a small checkpoint with a real tokenizer."""

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from core import files
from core.errors import InputError
from core.run import Run, RunFiles
from data.stream.manifests import NARROW, open_manifests, source_folder, tokenizer_path
from data.tokenizer import EOS
from data.tokenizer import load as load_tokenizer
from eval.config import EvaluationConfig
from eval.export import entries, export
from eval.heldout import evaluate, unigram_bits
from eval.hf.compare import compare, compare_by_layer
from eval.hf.exported import read_export, require_export
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


def test_export_has_the_published_layout(exported: Path, config: EvaluationConfig) -> None:
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


def test_a_run_a_checkpoint_and_an_export_are_the_same_model(
    exported: Path, config: EvaluationConfig
) -> None:
    tokens = torch.arange(12, 21).view(1, 9)
    expected = load_model(find_checkpoint(config))(tokens)
    for folder in (exported, config.run.folder, find_checkpoint(config)):
        torch.testing.assert_close(FalconMamba.from_pretrained(folder)(tokens), expected)


def test_transformers_computes_our_logits_with_and_without_cache(
    exported: Path, config: EvaluationConfig
) -> None:
    model = load_model(find_checkpoint(config))
    hf_model = AutoModelForCausalLM.from_pretrained(exported)
    tokens = torch.randint(12, 280, (1, 9))
    with torch.no_grad():
        expected = model.logits(tokens)
        torch.testing.assert_close(hf_model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        cache = None
        steps = []
        for t in range(tokens.shape[1]):
            out = hf_model(tokens[:, t : t + 1], cache_params=cache, use_cache=True)
            cache = out.cache_params
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-5)


def test_export_loads_with_its_tokenizer_and_generates(
    exported: Path, config: EvaluationConfig
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.eos_token_id == EOS
    assert tokenizer.decode(tokenizer("def f3").input_ids) == "def f3"
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


def test_a_wrong_export_is_refused(
    config: EvaluationConfig, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "eval.export.to_hf", lambda name, x: x.unsqueeze(1) * 1.01 if "conv_weight" in name else x
    )
    (config.run.files.hf / "tokenizer.json").unlink()
    before = (config.run.files.hf / "config.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="logits differ"):
        export(config)
    assert (config.run.files.hf / "config.json").stat().st_mtime_ns == before


def test_plain_mamba_cannot_be_exported() -> None:
    with pytest.raises(ValueError, match="mixer_norms"):
        hf_config(replace(MODEL, mixer_norms=False), EOS, "float32")
    with pytest.raises(ValueError, match="no multiple"):
        hf_config(replace(MODEL, d_inner=50), EOS, "float32")


def test_bits_per_byte(config: EvaluationConfig) -> None:
    """A uniform model has ln(vocab) nats per token, divided by the bytes of the tokens."""
    model: FalconMamba = load_model(find_checkpoint(config))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    manifests = open_manifests(config.data)
    scores = dict(evaluate(model, config.data, manifests, seq_len=16, batch_size=3, max_tokens=500))
    tokenizer = load_tokenizer(tokenizer_path(config.data))
    for name, score in scores.items():
        folder = source_folder(config.data, name)
        files = manifests[name].splits["heldout"]
        shards = [np.fromfile(folder / file.name, NARROW) for file in files]
        ids = np.concatenate(shards).astype(int)[1:501]
        # byte-level tokens have one character per byte
        num_bytes = sum(len(tokenizer.id_to_token(i)) for i in ids if i > EOS)
        assert score.tokens == 500 and score.bytes == num_bytes
        assert score.loss == pytest.approx(math.log(288), rel=1e-5)
        assert score.bits_per_byte == pytest.approx(500 * math.log2(288) / num_bytes, rel=1e-5)
        counts = np.bincount(ids)
        entropy = -sum(c * math.log2(c / 500) for c in counts if c)
        assert score.unigram_bits_per_byte == pytest.approx(entropy / num_bytes)
    combined = combine_scores(list(scores.values()))
    assert combined.tokens == 1000 and combined.loss == pytest.approx(math.log(288), rel=1e-5)


def test_the_score_does_not_depend_on_the_batch_size(config: EvaluationConfig) -> None:
    model = load_model(find_checkpoint(config))
    manifests = open_manifests(config.data)
    single, batched = (
        dict(evaluate(model, config.data, manifests, 16, batch_size, max_tokens=333))
        for batch_size in (1, 7)
    )
    for name in single:
        assert single[name].loss == pytest.approx(batched[name].loss, rel=1e-6)
    assert unigram_bits(torch.tensor([3, 3, 4, 4])) == pytest.approx(4.0)


def test_errors_name_the_fix(config: EvaluationConfig) -> None:
    with pytest.raises(InputError, match="train first"):
        find_checkpoint(replace(config, run=Run("x", "/nonexistent", 0)))
    with pytest.raises(InputError, match="keep_fp32 names Alog; parameters end in A_log"):
        list(entries(replace(config, export=replace(config.export, keep_fp32=["Alog"]))))
    with pytest.raises(InputError, match="manifest.json is missing"):
        find_checkpoint(replace(config, run=replace(config.run, checkpoint="/nonexistent")))


def test_results_are_reused_unless_data_or_export_changed(
    config: EvaluationConfig, exported: Path, capsys: Any
) -> None:
    export(config, max_bytes=40_000)
    run_evaluation(config)
    run_evaluation(config)
    assert "reused" in capsys.readouterr().out.splitlines()[-1]
    # reset_state changes the scores
    run_evaluation(replace(config, data=replace(config.data, reset_state=False)))
    assert "reused" not in capsys.readouterr().out.splitlines()[-1]
    (config.run.folder / "eval.json").write_text('{"checkp')  # truncated
    run_evaluation(config)
    weights = next(exported.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="eval/export.py"):
        run_evaluation(config)
    export(config, max_bytes=40_000)
    assert "reused" not in capsys.readouterr().out.splitlines()[-1]
    run_evaluation(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_comparison_by_layers_equals_that_of_full_models(
    config: EvaluationConfig,
    tmp_path: Path,
    dtype: str,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without memory for two models, export compares by layers; a wrong layer is detected."""
    (tmp_path / "checkpoints").symlink_to(config.run.files.checkpoints)
    settings = replace(config.export, dtype=dtype, keep_fp32=["A_log"])
    run = replace(config, run=Run("layers", str(tmp_path), 0), export=settings)
    monkeypatch.setattr("eval.export.COMPARE_BYTES", 1 << 40)
    export(run)
    assert "layer by layer" in capsys.readouterr().out
    checkpoint = find_checkpoint(run)
    reader = CheckpointReader(checkpoint)
    hf_folder = run.run.files.hf
    assert compare_by_layer(hf_folder, reader, MODEL, entries(run)) < 1e-5
    assert compare(hf_folder, load_model(checkpoint), entries(run)) < 1e-5
    read_rows = CheckpointReader.read_rows
    monkeypatch.setattr(
        CheckpointReader,
        "read_rows",
        lambda self, kind, name, start, stop: (
            read_rows(self, kind, name, start, stop) * (1.01 if "1.mixer.D" in name else 1)
        ),
    )
    assert compare_by_layer(hf_folder, reader, MODEL, entries(run)) > 1e-4


def test_nan_logits_are_refused(config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.export.compare", lambda *arguments: float("nan"))
    (config.run.files.hf / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="logits differ"):
        export(config)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def damage_record(folder: Path, key: str, value: object) -> None:
    path = RunFiles.export_record(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json": lambda folder: flip(folder / "config.json"),
    "tokenizer.json": lambda folder: flip(folder / "tokenizer.json"),
    "weights": lambda folder: flip(next(folder.glob("*.safetensors"))),
    "extra file": lambda folder: (folder / "notes.md").touch(),
    "extra folder": lambda folder: (folder / "more").mkdir(),
    "link": lambda folder: replace_by_link(folder / "config.json"),
    "no record": lambda folder: RunFiles.export_record(folder).unlink(),
    "empty record": lambda folder: os.truncate(RunFiles.export_record(folder), 0),
    "record with sizes only": lambda folder: damage_record(folder, "files", {"config.json": 5}),
    "record without end": lambda folder: RunFiles.export_record(folder).write_text("[" * 100_000),
    "other type": lambda folder: damage_record(folder, "tokens", "many"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_export_is_found(
    config: EvaluationConfig, exported: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    export(config, max_bytes=40_000)  # reused if no other test has changed it
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    read_export(folder)
    damage(folder)
    with pytest.raises(InputError) as error:
        read_export(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_an_export_of_another_checkpoint_is_found(
    config: EvaluationConfig, exported: Path, tmp_path: Path
) -> None:
    export(config, max_bytes=40_000)
    checkpoint = tmp_path / find_checkpoint(config).name
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("another")
    require_export(exported, find_checkpoint(config))
    with pytest.raises(InputError, match=f"of another {checkpoint.name}"):
        require_export(exported, checkpoint)
    with pytest.raises(InputError, match="is an export of step-"):
        require_export(exported, tmp_path / "step-1")


class Killed(BaseException):
    """In place of SIGKILL."""


def dying(function: Callable[..., Any], name: str, left: list[int]) -> Callable[..., Any]:
    """A function that raises Killed at the last of `left` calls on the folder or its parts."""

    def call(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if Path(path).name.startswith(name):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
        return function(path, *arguments, **keywords)

    return call


def is_whole(folder: Path) -> bool:
    try:
        read_export(folder)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5])
def test_a_killed_export_leaves_one_that_is_whole(
    config: EvaluationConfig,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    exchanges: bool,
    calls: int,
) -> None:
    """A kill before each rename and removal of a replaced export."""
    monkeypatch.setattr("eval.export.verify", lambda *arguments: None)
    monkeypatch.setattr("eval.export.check_tokenizer", lambda *arguments: None)
    other = replace(config, export=replace(config.export, dtype="bfloat16"))
    export(config)
    left = [calls]
    with monkeypatch.context() as patch:
        for owner, name in ((files, "_exchange"), (Path, "rename"), (shutil, "rmtree")):
            patch.setattr(owner, name, dying(getattr(owner, name), exported.name, left))
        if not exchanges:
            patch.setattr(files, "_exchange", lambda *arguments: False)
        with suppress(Killed):
            export(other)
    folders = [exported, exported.with_name("hf.part")]
    whole = [folder for folder in folders if folder.is_dir() and is_whole(folder)]
    assert whole, "neither the old nor the new export"
    export(other)
    assert read_export(exported).dtype == "bfloat16"
    assert not list(exported.parent.glob("hf.*"))


def test_files_of_the_user_are_not_removed(config: EvaluationConfig, exported: Path) -> None:
    other = replace(config, export=replace(config.export, keep_fp32=["A_log"]))
    note = exported / "README.md"
    for text in ("mine", note.read_text() + "mine"):  # another file, an edited card
        note.write_text(text)
        read_export(exported)  # is no fault
        with pytest.raises(InputError, match=r"README\.md, which is not the export's"):
            export(other)
        assert note.read_text() == text
    note.unlink()


def test_an_export_folder_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    """The folder that the link names stays as it is."""
    for name in ("elsewhere", "hf.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    (tmp_path / "hf").symlink_to(tmp_path / "elsewhere")
    files.publish_folder(tmp_path / "hf.part", tmp_path / "hf")
    assert (tmp_path / "hf" / "name").read_text() == "hf.part"
    assert (tmp_path / "elsewhere" / "name").read_text() == "elsewhere"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "hf"]
