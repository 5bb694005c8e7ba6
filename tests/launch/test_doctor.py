"""launch/doctor.py: bad findings have a fix, and a working machine has none."""

from pathlib import Path

import pytest
import torch

from launch import doctor
from launch.planning import checks
from launch.planning.checks import CHECKS
from model import kernels
from tests.compose import run_config
from tests.corpus import make_corpus
from train.config import EngineKind, RunConfig


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    run = run_config("demo", f"run.dir={tmp_path}/run")
    run.data = make_corpus(tmp_path / "data")
    return run


def test_a_working_machine_has_no_bad_finding(config: RunConfig) -> None:
    results = doctor.run_checks(config)
    assert [result.name for result in results] == list(CHECKS)
    assert [
        result for result in results if result.finding.state == "bad" and result.name != "Slurm"
    ] == []
    assert all(result.finding.fix for result in results if result.finding.state == "bad")
    assert not list(config.run.folder.parent.glob(".doctor-*"))


def test_wrong_kernels_are_found(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = kernels.load(config.compute.kernels, "cpu")

    class Wrong:
        name = "wrong"

        @staticmethod
        def selective_scan(
            doc_starts: torch.Tensor, **inputs: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return correct.selective_scan(**inputs)  # without state resets

    monkeypatch.setattr(kernels, "load", lambda *_: Wrong)
    assert checks.kernels(config).state == "bad"


def test_missing_data_disk_space_and_memory_are_bad_with_a_fix(
    config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    finding = checks.data(config)
    assert finding.state == "bad" and "data/prepare.py" in finding.fix
    large = run_config(
        "7b",
        f"run.dir={tmp_path}/7b",
        "data.folder=/d",
        "data.tokenizer.path=/t",
        "cluster.device=cpu",
        "checkpoint.keep_last=10000",
    )
    for check in (checks.disk, checks.memory):
        assert check(large).state == "bad" and check(large).fix


def test_a_failed_collective_is_found(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checks,
        "ALL_REDUCE",
        "import sys; sys.exit('no route to host' if sys.argv[4] == '1' else 0)",
    )
    finding = checks.collectives(config)
    assert (
        finding.state == "bad"
        and "no route to host" in finding.text
        and "GLOO_SOCKET_IFNAME" in finding.fix
    )


def test_an_engine_without_a_gpu_is_found(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks.torch_and_driver(config).state == "ok"
    config.parallel.engine = EngineKind.megatron
    finding = checks.torch_and_driver(config)
    assert finding.state == "bad" and finding.fix == "set parallel.engine=deepspeed"
