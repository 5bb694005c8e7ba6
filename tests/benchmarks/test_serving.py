"""llama.cpp, its converter, transformers and lm-eval on exports; packages come from the index."""

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import serving
from data.pipeline.falcon import read_gguf
from data.tokenizer import EOS, load
from eval.config import EvaluationConfig
from eval.export import export
from eval.hf import llama_cpp


@pytest.fixture(scope="module")
def tools() -> Iterator[serving.Packages]:
    try:
        with serving.packages() as found:
            yield found
    except serving.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", serving.cases(), ids=lambda case: case.name)
def test_readers_of_an_export_agree(
    case: serving.Case, tools: serving.Packages, tmp_path: Path
) -> None:
    """Token ids and argmax are equal (asserted inside), and no begin token is added."""
    found, answer = serving.run_case(case, tools, tmp_path)
    assert found.transformers <= serving.EXACT and found.lm_eval <= serving.EXACT
    assert found.llama_cpp <= case.limit
    assert found.llama_cpp_one_eps <= serving.EXACT
    if case.limit > serving.EXACT:  # the released pair is told from one eps
        assert found.llama_cpp > 2 * found.llama_cpp_one_eps
    assert (answer.bos, answer.eos, answer.add_bos, answer.ends) == (EOS, EOS, False, True)
    assert answer.logits.shape == (found.tokens, case.model.vocab_size)
    with (tmp_path / "model.gguf").open("rb") as file:
        values = read_gguf(file.read(2**23))
    assert values["tokenizer.ggml.pre"] == "falcon"
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.padding_token_id"] == EOS
    assert len(values["tokenizer.ggml.tokens"]) == case.model.vocab_size


def test_the_converter_knows_the_vocabularies_of_our_table(tools: serving.Packages) -> None:
    source = tools.conversion.read_text(encoding="utf-8")
    names = dict(re.findall(r'if chkhsh == "(\w{64})":\n(?:\s*#.*\n)*\s*res = "([^"]+)"', source))
    (probe,) = re.findall(r"chktxt = ('.*')\n", source)
    assert llama_cpp.table() == {"probe": ast.literal_eval(probe), "pre_tokenizers": names}
    assert llama_cpp.pre_tokenizer(load(tools.tokenizer)) == "falcon"


def test_the_converter_refuses_a_vocabulary_that_was_trained_here(
    config: EvaluationConfig, tools: serving.Packages, tmp_path: Path
) -> None:
    """As export said; the hash of the converter's log is ours."""
    export(config)
    assert "does not know this vocabulary" in (config.run.files.hf / "README.md").read_text()
    result = serving.convert(tools, config.run.files.hf, tmp_path / "model.gguf")
    assert result.returncode and "BPE pre-tokenizer was not recognized" in result.stderr
    tokenizer = load(config.run.files.hf / "tokenizer.json")
    assert f"chkhsh:  {llama_cpp.probe_hash(tokenizer)}" in result.stderr


def test_a_changed_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "falcon_mamba" / "serving" / "package"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert serving.fetched("", "package", hashlib.sha256(b"x").hexdigest()) == path
    path.write_bytes(b"y")
    with pytest.raises(ValueError, match="has sha256"):
        serving.fetched("", "package", hashlib.sha256(b"x").hexdigest())
    with pytest.raises(serving.Unavailable, match="does not answer"):
        serving.fetched("https://index.invalid/x", "other", "")
