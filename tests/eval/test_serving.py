"""What an export says about llama.cpp, and the files from which its readers take it."""

import json
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from core.run import Run
from data.stream.manifests import tokenizer_path
from data.tokenizer import load
from eval.config import EvaluationConfig
from eval.export import export
from eval.hf import llama_cpp
from model.hf import hf_config
from tests.eval.conftest import MODEL


def test_log_and_card_say_that_llama_cpp_does_not_know_a_trained_vocabulary(
    config: EvaluationConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    export(config)
    line = f"its converter ({llama_cpp.CONVERTER}) does not know this vocabulary"
    assert line in capsys.readouterr().out
    card = (config.run.files.hf / "README.md").read_text()
    assert line in card and "convert_hf_to_gguf.py" not in card
    assert 'AutoTokenizer.from_pretrained("FOLDER")' in card and "vLLM, not tested" in card


def test_a_known_vocabulary_gets_the_commands(
    config: EvaluationConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The hash is of the plain ids, as a list; equal eps have no remark."""
    tokenizer = load(tokenizer_path(config.data))
    content = llama_cpp.table()
    ids = tokenizer.encode(content["probe"], add_special_tokens=False).ids
    names = {sha256(str(ids).encode()).hexdigest(): "falcon"}
    monkeypatch.setattr(llama_cpp, "table", lambda: {**content, "pre_tokenizers": names})
    (tmp_path / "checkpoints").symlink_to(config.run.files.checkpoints)
    export(replace(config, run=Run("known", str(tmp_path), 0)))
    out = capsys.readouterr().out
    assert "knows the vocabulary as 'falcon'" in out and "it takes 1e-05 for the norms of B" in out
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "python convert_hf_to_gguf.py FOLDER" in card and "it takes 1e-05 for" in card
    equal = replace(MODEL, mixer_norm_eps=MODEL.norm_eps)
    assert llama_cpp.eps_difference(equal) is None and not llama_cpp.obstacles(equal, tokenizer)
    (wide,) = llama_cpp.obstacles(replace(MODEL, d_inner=72), tokenizer)
    assert "d_inner = 2 x d_model, not 72 with 24" in wide


def test_an_export_asks_no_reader_for_further_tokens(config: EvaluationConfig) -> None:
    """No begin or end token around a text, and no rows that the embedding lacks."""
    export(config)
    written = json.loads((config.run.files.hf / "tokenizer_config.json").read_text())
    assert written["add_bos_token"] is written["add_eos_token"] is False
    assert "pad_vocab_size_multiple" not in hf_config(MODEL, 11, "float32")
    odd = replace(MODEL, vocab_size=MODEL.vocab_size + 1)
    assert hf_config(odd, 11, "float32")["pad_vocab_size_multiple"] == 1


def test_the_snippet_of_a_card_runs(
    config: EvaluationConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    export(config)
    card = (config.run.files.hf / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    capsys.readouterr()
    exec(compile(snippet.replace("FOLDER", str(config.run.files.hf)), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The lamps")
