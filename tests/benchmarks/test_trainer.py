"""The benchmark beside transformers' Trainer."""

from pathlib import Path

import torch

from benchmarks.trainer import export_initial
from model.hf import HfFolder
from model.kernels import REFERENCE
from model.parallel.build import build_model
from tests.compose import run_config


def test_the_trainer_starts_from_our_initial_weights(tmp_path: Path) -> None:
    config = run_config("demo")
    export_initial(config, tmp_path)
    model = build_model(config.model, REFERENCE, config.run.seed, torch.device("cpu"))
    exported = HfFolder(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(exported.read_full(name), parameter), name
