"""Streamed generation, and where its model and tokenizer come from."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from data.stream.manifests import tokenizer_path
from eval.config import EvaluationConfig
from eval.export import export
from eval.generate import main, stream
from eval.model_source import find_checkpoint
from eval.short_keys import expand_short_keys
from model.generation import GREEDY
from tests.tiny import TINY, model_of

PROMPT = "def f(x, ${y}): "


def test_streaming_yields_complete_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A two-byte character of two tokens is yielded once; end-of-text ends the stream."""
    from data.tokenizer import EOS, untrained_tokenizer

    tokenizer = untrained_tokenizer()
    # in the byte-level alphabet: a, e acute, newline
    byte_ids = {"a": 20, "\u00c3": 21, "\u00a9": 22, "\u010a": 23}

    class FakeTokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> object:
            return type("Encoding", (), {"ids": [byte_ids["a"] for _ in text]})()

        def decode(self, ids: list[int]) -> str:
            letters = {index: letter for letter, index in byte_ids.items()}
            return str(tokenizer.decoder.decode([letters[i] for i in ids]))

    sequence = [20, 21, 22, 23, 20, EOS, 20]
    model = model_of(TINY)
    monkeypatch.setattr(model, "stream", lambda *arguments: (torch.tensor([i]) for i in sequence))
    texts = list(stream(model, FakeTokenizer(), EOS, "a", 7, GREEDY))  # type: ignore[arg-type]
    assert texts == ["a", "\u00e9", "\n", "a"]


def generated(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    few = ["generate.new_tokens=3", "generate.sampling.temperature=0"]
    monkeypatch.setattr(sys, "argv", ["eval/generate.py", *expand_short_keys([*words, *few])])
    main()


def test_a_run_a_checkpoint_and_an_export_continue_a_prompt_alike(
    config: EvaluationConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    run = config.run.folder
    shutil.copytree(config.run.files.checkpoints, tmp_path / "run" / "checkpoints")
    export(config)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"folder": config.data.folder}}))
    capsys.readouterr()
    texts = set()
    for folder in (run, find_checkpoint(config), config.run.files.hf):
        generated(monkeypatch, f"checkpoint={folder}", f"prompt={PROMPT}")
        texts.add(capsys.readouterr().out)
    generated(monkeypatch, "+experiment=demo", f"run.dir={run}", f"prompt={PROMPT}")
    texts.add(capsys.readouterr().out)
    assert len(texts) == 1 and texts.pop().startswith(PROMPT)

    def error(folder: Path) -> str:
        with pytest.raises(SystemExit):
            generated(monkeypatch, f"checkpoint={folder}")
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert "no config.yaml that names its data" in error(tmp_path / "run")
    record = yaml.safe_dump({"data": {"folder": str(tmp_path / "moved")}})
    (tmp_path / "run" / "config.yaml").write_text(record)
    path = tokenizer_path(replace(config.data, folder=str(tmp_path / "moved")))
    assert f"copy its tokenizer.json and tokenizer_config.json to {path.parent}" in error(
        tmp_path / "run"
    )
    assert "cannot use checkpoint" in error(tmp_path)
    (config.run.files.hf / "export.json").unlink()
    (config.run.files.hf / "tokenizer.json").unlink()
    assert "no tokenizer in" in error(config.run.files.hf)
