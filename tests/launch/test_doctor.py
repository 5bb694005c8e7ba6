"""launch/doctor.py: bad findings have a fix, and a working machine has none."""

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from launch import doctor
from launch.planning import checks, run_checks
from launch.planning.checks import MACHINE_CHECKS
from launch.planning.run_checks import RUN_CHECKS
from model import kernels
from model.hf import HfFolder
from tests.compose import run_config
from tests.corpus import make_corpus
from tests.test_fixtures import FIXTURES
from train.config import EngineKind, RunConfig

OK = checks.Finding("ok", "as it should be")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    run = run_config("demo", f"run.dir={tmp_path}/run")
    run.data = make_corpus(tmp_path / "data")
    return run


def test_a_working_machine_has_no_bad_finding(config: RunConfig) -> None:
    results = doctor.run_checks(config)
    assert [result.name for result in results] == list(MACHINE_CHECKS | RUN_CHECKS)
    assert [
        result for result in results if result.finding.state == "bad" and result.name != "Slurm"
    ] == []
    assert all(result.finding.fix for result in results if result.finding.state == "bad")
    assert not list(config.run.folder.parent.glob(".*-*"))


def test_weights_of_another_shape_are_found_before_a_job(config: RunConfig, tmp_path: Path) -> None:
    weights = RUN_CHECKS["weights"]
    assert weights(config).state == "ok", "random weights"
    config.run.init_from = str(tmp_path / "none")
    assert weights(config).state == "note", "a run that is still to come"
    released = FIXTURES / "runs" / "zero1-dp2" / "hf"
    config.run.init_from = str(released)
    finding = weights(config)
    assert finding.state == "bad" and "has another shape: give model.vocab_size=96" in finding.text
    config.model = HfFolder(released).config
    assert weights(config).state == "ok"
    config.run.init_from = str(released.parent)
    assert weights(config).state == "ok", "a run"


def test_without_an_experiment_the_machine_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = []
    monkeypatch.setattr(
        doctor, "MACHINE_CHECKS", {"ranks": lambda config: checked.append(config) or OK}
    )
    monkeypatch.setattr(doctor, "RUN_CHECKS", {"data": lambda config: 1 / 0})
    monkeypatch.setattr(sys, "argv", ["launch/doctor.py", "compute.kernels=reference"])
    doctor.check_machine_or_run()
    out = capsys.readouterr().out
    assert "this-machine" in out and "compiler" in out and "memory, disk" in out
    assert checked[0].cluster.ranks_per_node == (torch.cuda.device_count() or 2)
    monkeypatch.setattr(sys, "argv", ["launch/doctor.py", "experiment=demo"])
    with pytest.raises(SystemExit):
        doctor.check_machine_or_run()
    assert "ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "nodes", "state"),
    [("tmpfs", 2, "bad"), ("ext4", 2, "note"), ("tmpfs", 1, "ok"), ("nfs4", 2, "ok")],
)
def test_folders_of_several_nodes_are_shared(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, kind: str, nodes: int, state: str
) -> None:
    config.cluster.nodes = nodes
    root = SimpleNamespace(mountpoint="/", fstype="nfs")
    here = SimpleNamespace(mountpoint=str(config.run.folder.parent), fstype=kind)
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [root, here])
    finding = run_checks.file_system(config)
    assert finding.state == state, finding
    assert state == "ok" or (kind in finding.text and "run.dir" in finding.fix)


def test_a_plan_that_does_not_fit_is_found(config: RunConfig) -> None:
    assert run_checks.data(config).state == "ok"
    config.data.stages[0].tokens *= 1000
    finding = run_checks.data(config)
    assert finding.state == "bad" and "max_epochs" in finding.text


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
    finding = run_checks.data(config)
    assert finding.state == "bad" and "data/prepare.py" in finding.fix
    large = run_config(
        "7b",
        f"run.dir={tmp_path}/7b",
        "data.folder=/d",
        "data.tokenizer.path=/t",
        "cluster.device=cpu",
        "checkpoint.keep_last=10000",
    )
    for check in (run_checks.disk, run_checks.memory):
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


def test_a_machine_without_a_compiler_can_run_slowly(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/none")
    finding = checks.compiler(config)
    assert finding.state == "note" and "g++" in finding.fix and "/none" in finding.text
    monkeypatch.setattr(checks, "DEMO_GIB", 1e9)
    assert checks.memory_and_disk(config).state == "note"
