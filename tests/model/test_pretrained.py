"""The model in three lines: published defaults, initial values, folders, kernels by device."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InputError
from model.config import Backend, ModelConfig
from model.kernels import REFERENCE, load
from model.mamba import FalconMamba
from tests.commands import ROOT, TIMEOUT_SECONDS
from tests.compose import run_config

SMALL = ModelConfig(vocab_size=96, d_model=32, n_layer=2)
IDS = torch.arange(12).view(1, 12) % 96


def test_defaults_are_the_published_model() -> None:
    assert asdict(ModelConfig()) == asdict(run_config("7b").model)


def test_sizes_follow_from_the_width() -> None:
    config = ModelConfig(d_model=40, n_layer=3, vocab_size=128)
    assert (config.d_inner, config.dt_rank, config.d_state) == (80, 3, 16)
    assert ModelConfig(d_model=40, d_inner=48, dt_rank=5).d_inner == 48


@pytest.mark.parametrize(
    ("key", "value"),
    [("d_model", 0), ("n_layer", -1), ("vocab_size", 1.5), ("norm_eps", math.nan)],
)
def test_a_wrong_number_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.{key} is .*: set a"):
        ModelConfig(**{key: value})


def test_a_model_is_initialised_and_calls_give_logits_and_losses() -> None:
    model = FalconMamba(SMALL)
    logits = model(IDS)
    assert logits.shape == (1, 12, 96)
    targets = IDS.roll(-1, 1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(IDS, targets), expected)
    assert abs(expected.item() - math.log(96)) < 0.1
    torch.testing.assert_close(FalconMamba(SMALL)(IDS), logits)
    assert not torch.equal(FalconMamba(SMALL, seed=1)(IDS), logits)


def test_generate_takes_lists_and_tensors() -> None:
    model = FalconMamba(SMALL)
    assert torch.equal(model.generate(IDS, count=3), model.generate(IDS.tolist(), count=3))
    with pytest.raises(InputError, match="list of lists"):
        model.generate([1, 2, 3], count=3)  # type: ignore[list-item]


def test_kernels_follow_the_device() -> None:
    fastest = load(Backend.auto, "cpu")
    with torch.device("meta"):
        model = FalconMamba(SMALL)
    assert model.layers[0].mixer.kernels is REFERENCE
    model.to_empty(device="cpu")
    assert {m.kernels for m in model.modules() if hasattr(m, "kernels")} == {fastest}
    assert model.to("meta").kernels is fastest
    assert FalconMamba(SMALL, REFERENCE).to("cpu").kernels is REFERENCE


def test_weights_in_bf16_need_no_autocast() -> None:
    model = FalconMamba(SMALL)
    logits = model(IDS)
    torch.testing.assert_close(model.bfloat16()(IDS).float(), logits, rtol=0.05, atol=0.05)
    assert model.generate(IDS, count=2).shape == (1, 2)


def test_a_folder_gives_the_same_model(tmp_path: Path) -> None:
    model = FalconMamba(SMALL, seed=3)
    model.eos = 7
    model.save_pretrained(tmp_path / "hf")
    read = FalconMamba.from_pretrained(tmp_path / "hf")
    assert read.eos == 7 and read.config == SMALL
    assert torch.equal(read(IDS), model(IDS))
    half = FalconMamba.from_pretrained(str(tmp_path / "hf"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_folder_without_an_end_token(tmp_path: Path) -> None:
    FalconMamba(SMALL).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None
    assert FalconMamba.from_pretrained(tmp_path).eos is None


def test_other_folders_are_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="no model in .*: no checkpoint in") as error:
            FalconMamba.from_pretrained(folder)
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(InputError, match="model_type is 'mamba'"):
        FalconMamba.from_pretrained(tmp_path)


MEASURE = """
import pathlib, sys, torch
from model.mamba import FalconMamba
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
FalconMamba.from_pretrained(sys.argv[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
before = peak()
model = FalconMamba.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
print((peak() - before) / sum(2 * p.numel() for p in model.parameters()))
"""


def test_weights_are_held_once(tmp_path: Path) -> None:
    """The peak of memory is the model's own, plus one tensor's, here a tenth of it."""
    large = replace(SMALL, vocab_size=4096, d_model=512, d_inner=1024, n_layer=40)
    for name, config in {"small": SMALL, "large": large}.items():
        FalconMamba(config).bfloat16().save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert result.returncode == 0, result.stderr
    assert 0.5 < float(result.stdout) < 1.4
