"""One export, three readers; needs the package index and a wheel for Python 3.11 on x86_64."""

from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from benchmarks.serving import WHEEL, Answer, compare, fetch, unavailable_reason
from core.errors import InputError
from tests.commands import python
from tests.compose import run_config
from tests.eval.test_suite import LAUNCHER_VARIABLES


def test_every_reader_has_the_same_ids_and_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHER_VARIABLES:  # deepspeed set them in an earlier test; accelerate reads them
        monkeypatch.delenv(name, raising=False)
    if reason := unavailable_reason():
        pytest.skip(reason)
    url = str(run_config("7b").data.tokenizer.url)
    try:
        urlopen(Request(url, method="HEAD"), timeout=20).close()
    except URLError as error:
        pytest.skip(f"the Python package index does not answer: {error}")
    result = python("-m", "benchmarks.serving", "--no-record", "--cache", str(tmp_path))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum("llama.cpp: ids and likeliest tokens of 36 positions equal" in x for x in lines) == 2
    assert lines[-1].startswith("largest relative difference: ")
    with (tmp_path / WHEEL).open("r+b") as file:
        file.write(b"other")
    with pytest.raises(InputError, match="has another sha256"):
        fetch(tmp_path)


def test_differences_are_found() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7))
    exact = [Answer([1, 2, 3, 4, 5], logits)]
    assert compare(exact, exact, "x").largest == 0
    moved = compare([Answer([1, 2, 3, 4, 5], logits + 0.01)], exact, "x")
    assert moved.largest == pytest.approx(0.01 / logits.std())
    assert moved.root_mean_square == pytest.approx(moved.largest)
    with pytest.raises(InputError, match="ids"):
        compare([Answer([1, 2, 3, 4, 6], logits)], exact, "x")
    with pytest.raises(InputError, match="likeliest"):
        compare([Answer([1, 2, 3, 4, 5], -logits)], exact, "x")
