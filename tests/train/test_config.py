"""Every experiment composes, converts and builds on meta; mistakes are one clear line."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from core.command import CONFIGS, one_line
from core.errors import InputError
from model.flops import parameter_count
from model.kernels import REFERENCE, cuda
from model.mamba import FalconMamba
from tests.commands import PATIENCE, forked
from tests.compose import run_config
from train.build import announce
from train.checkpoint.manager import TrainState
from train.config import EngineKind
from train.costs.memory import check_memory, estimate_memory
from train.device import check_device
from train.distributed import Ranks
from train.schedule import Schedule

ROOT = Path(CONFIGS).parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))


def test_the_named_experiments_exist() -> None:
    assert {"7b", "1b", "130m", "demo"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_builds_on_meta(experiment: str) -> None:
    config = run_config(experiment)
    with torch.device("meta"):
        model = FalconMamba(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(
        config.model
    )
    assert Schedule(config.schedule, config.optim.lr, config.data).total == config.tokens
    assert config.run.name == experiment


def test_7b_is_the_published_model() -> None:
    config = run_config("7b")
    assert parameter_count(config.model) == 7_272_665_088
    assert abs(config.tokens - 5.8e12) < 5 * 8192
    fits = estimate_memory(config, 256).total / 2**30
    assert fits < config.cluster.memory_gib, f"the 7b needs {fits:.0f} GiB of a rank"


def test_the_7b_is_for_gpus_and_says_the_way_back() -> None:
    config = run_config("7b")
    assert config.parallel.engine is EngineKind.megatron
    with pytest.raises(InputError, match="set parallel.engine=deepspeed cluster.device=cpu$"):
        check_device(config.cluster.device, "cpu", config.parallel)
    check_device(config.cluster.device, "cuda", config.parallel)
    back = run_config("7b", "parallel.engine=deepspeed", "cluster.device=cpu")
    check_device(back.cluster.device, "cpu", back.parallel)


def test_token_counts_may_be_floats_that_are_whole() -> None:
    assert run_config("demo", "schedule.decay_tokens=1e5").schedule.decay_tokens == 100_000
    with pytest.raises(OmegaConfBaseException):
        run_config("demo", "schedule.decay_tokens=1.5")


def test_token_counts_may_be_written_with_an_exponent() -> None:
    stages = "[{name: a, tokens: 1e6, seq_len: 256, mixture: {web: 1}}]"
    run = run_config("demo", "schedule.warmup_tokens=1e4", f"data.stages={stages}")
    assert (run.schedule.warmup_tokens, run.data.stages[0].tokens) == (10_000, 1_000_000)
    web = run_config("demo", "+data.sources.web.expected_tokens=2e9").data.sources["web"]
    assert web.expected_tokens == 2 * 10**9


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.lrr=1"], "optim.lrr"),
        (["+optim.lrr=1"], "optim.lrr"),
        (["train.profile=3"], "set one of its keys, train.profile.steps"),
        (["+shedule.min_lr=5"], "no section shedule"),
        (["data.block_tokens=0"], "at least 1"),
        (["optim.beta1=2"], "beta1"),
        (["validation.batch_sequences=0"], "at least 1"),
        (["optim.eps=tiny"], "optim.eps"),
        (["compute.recompute=some"], "expected one of"),
        (["schedule.min_lr=1"], "exceeds the peak optim.lr 0.004"),
        (["schedule.decay_tokens=10000000000"], "exceeds the stages"),
        (["parallel.tensor_parallel=3"], "does not divide"),
        (["parallel.micro_batch_tokens=100"], "is below the longest sequence"),
        (["data.tokenizer.vocab_size=8192"], "exceeds model.vocab_size"),
        (["data.block_tokens=300"], "does not divide data.block_tokens"),
        (["parallel.zero_stage=7"], "zero_stage"),
        (["model.d_model=0"], "at least 1"),
        (["model=9b"], "model has no 9b; it has 130m, 1b, 7b, demo"),
    ],
)
def test_a_mistake_is_named_on_one_line(overrides: list[str], says: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as raised:
        run_config("demo", *overrides)
    line = one_line(raised.value)
    assert says in line and "\n" not in line


def test_an_unknown_source_in_a_mixture_is_named() -> None:
    stages = "data.stages=[{name: a, tokens: 1024, seq_len: 128, mixture: {webb: 1}}]"
    with pytest.raises(ValueError, match="webb"):
        run_config("demo", stages)


def test_a_machine_too_small_is_told_what_to_run() -> None:
    config = run_config("7b")
    with pytest.raises(InputError) as raised:
        check_memory(config, world_size=2, local_world_size=2, device="cpu", available=24 * 2**30)
    text = str(raised.value)
    assert (
        "GiB" in text
        and "has 24.0 GiB" in text
        and "+experiment=demo" in text
        and "32 nodes" in text
    )
    check_memory(run_config("demo"), 2, 2, "cpu", 2 * 2**30)


def test_torchrun_leaves_the_line_as_the_last_word() -> None:
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [
        torchrun,
        "--nproc-per-node",
        "2",
        "train/pretrain.py",
        "+experiment=demo",
        "optim.lrr=1",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    assert (
        result.stderr.count("error: the config has no key optim.lrr; did you mean optim.lr?") == 1
    )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["train/pretrain.py", "+experiment=7b"], "+experiment=demo"),
        (["train/pretrain.py", "+experiment=demo", "data.folder=/nonexistent"], "data/prepare.py"),
        (
            ["train/pretrain.py", "+experiment=demo", "parallel.engine=megatron"],
            "set parallel.engine=deepspeed",
        ),
        (["train/pretrain.py", "+experiment=demo", "optim.lrr=1"], "optim.lrr"),
        (["eval/export.py", "+experiment=demo", "run.dir=/nonexistent"], "no checkpoint"),
        (["train/pretrain.py"], "+experiment=NAME"),
    ],
)
def test_the_command_says_it_without_a_traceback(command: list[str], says: str) -> None:
    result = forked(*command)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0], result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_a_gpu_run_on_slow_kernels_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """And what to install; no GPU need be here."""
    config = run_config("demo")
    ranks = Ranks(0, 1, 0, 1, 0, 1, 0, 1, torch.device("cuda"))
    plan: Any = SimpleNamespace(epochs=lambda: {"web": 0.5})
    with mock.patch.object(
        cuda, "unavailable_reason", lambda: "no cuda-core: pip install 'cuda-core[cu13]'"
    ):
        announce(config, plan, REFERENCE, ranks, TrainState(0, 0, 0, "", {}))
    lines = capsys.readouterr().out.splitlines()
    assert "warning: the reference kernels are far too slow for a GPU run" in lines
    assert "faster kernels are not used: cuda: no cuda-core: pip install 'cuda-core[cu13]'" in lines
    assert any(line.startswith("faster kernels are not used: mamba_ssm: no ") for line in lines)
