"""Every experiment composes and builds on meta; a mistake is reported on one line."""

import os
import signal
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
from torch.distributed.elastic.multiprocessing.api import SignalException

from core.compose import CONFIGS
from core.config_errors import format_error
from core.errors import InputError
from launch.jobs.torchrun import quiet, set_defaults_for_training
from model.flops import parameter_count
from model.kernels import REFERENCE, cuda
from model.mamba import FalconMamba
from tests.commands import TIMEOUT_SECONDS, forked, python
from tests.compose import run_config
from train.build import log_run_summary
from train.checkpoint.manager import TrainState
from train.config import EngineKind
from train.costs.memory import check_memory, estimate_memory
from train.device import check_device, check_local_rank, free_of_cgroups
from train.distributed import Ranks
from train.schedule import Schedule

ROOT = Path(CONFIGS).parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
WEIGHTS_AND_TEXT = ["run.init_from=x", "data.sources.new.input=y"]
GIVEN = {  # what experiments leave to their user
    "own": [f"data.input={ROOT / 'docs' / 'pages'}"],
    "continue": WEIGHTS_AND_TEXT,
    "decay": WEIGHTS_AND_TEXT,
}


def test_the_named_experiments_exist() -> None:
    assert {"7b", "1b", "130m", "demo"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_builds_on_meta(experiment: str) -> None:
    config = run_config(experiment, *GIVEN.get(experiment, []))
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
    memory_gib = estimate_memory(config, 256).total / 2**30
    assert memory_gib < config.cluster.memory_gib


def test_the_7b_needs_gpus_and_names_the_fallback() -> None:
    config = run_config("7b")
    assert config.parallel.engine is EngineKind.megatron
    with pytest.raises(InputError, match="set parallel.engine=deepspeed cluster.device=cpu$"):
        check_device(config.cluster.device, "cpu", config.parallel)
    check_device(config.cluster.device, "cuda", config.parallel)
    fallback = run_config("7b", "parallel.engine=deepspeed", "cluster.device=cpu")
    check_device(fallback.cluster.device, "cpu", fallback.parallel)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    check_local_rank("cuda")
    monkeypatch.setenv("LOCAL_RANK", "4")
    check_local_rank("cpu")
    with pytest.raises(InputError, match="this node has 5 ranks and 4 GPUs"):
        check_local_rank("cuda")
    # rank 0 too, which then prints at once, and torchrun ends the others before they do
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match=r"8 ranks and 4 GPUs, .*: start with --nproc-per-node 4"):
        check_local_rank("cuda")


def test_token_counts_may_be_floats_that_are_whole() -> None:
    assert run_config("demo", "schedule.decay_tokens=1e5").schedule.decay_tokens == 100_000
    with pytest.raises(InputError, match=r"schedule.decay_tokens is 1.5: set a whole number"):
        run_config("demo", "schedule.decay_tokens=1.5")


def test_token_counts_may_be_written_with_an_exponent() -> None:
    stages = "[{name: a, tokens: 1e6, seq_len: 256, mixture: {web: 1}}]"
    run = run_config("demo", "schedule.warmup_tokens=1e4", f"data.stages={stages}")
    assert (run.schedule.warmup_tokens, run.data.stages[0].tokens) == (10_000, 1_000_000)
    web = run_config("demo", "+data.sources.web.expected_tokens=2e9").data.sources["web"]
    assert web.expected_tokens == 2 * 10**9


@pytest.mark.parametrize(
    ("overrides", "message"),
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
        (["model.d_model=0"], "model.d_model is 0: set a whole number from 1 to"),
        (["+train.profile.ranks=[0,-1]"], "train.profile.ranks.1 is -1"),
        (["parallel.engine=deepspeed", "optim.lr=-1"], "optim.lr is -1"),
        (
            ["model=9b"],
            "model has no 9b; it has 0.3m, 130m, 16m, 1b, 1m, 370m, 4m, 60m, 7b, demo, own",
        ),
    ],
)
def test_a_mistake_is_named_on_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as raised:
        run_config("demo", *overrides)
    line = format_error(raised.value)
    assert message in line and "\n" not in line


def test_an_unknown_source_in_a_mixture_is_named() -> None:
    stages = "data.stages=[{name: a, tokens: 1024, seq_len: 128, mixture: {webb: 1}}]"
    with pytest.raises(ValueError, match="webb"):
        run_config("demo", stages)


def test_too_little_memory_is_refused_with_alternatives() -> None:
    config = run_config("7b")
    with pytest.raises(InputError) as raised:
        check_memory(config, world_size=2, local_world_size=2, device="cpu", available=24 * 2**30)
    text = str(raised.value)
    for part in ("has 24.0 GiB", "+experiment=demo", "32 nodes"):
        assert part in text
    check_memory(run_config("demo"), 2, 2, "cpu", 2 * 2**30)


def test_memory_limits_of_process_and_control_groups_count(tmp_path: Path) -> None:
    """Version 2 below a limited parent; version 1, whose cached files count as free."""
    files = {
        "memory.max": "max",
        "job/memory.max": "3000",
        "job/memory.current": "1000",
        "job/memory.stat": "anon 900\ninactive_file 50\nactive_file 50\n",
        "job/step/memory.max": "max",
        "memory/v1/memory.limit_in_bytes": "7000",
        "memory/v1/memory.usage_in_bytes": "6000",
        "memory/v1/memory.stat": "total_inactive_file 300\ntotal_active_file 200\n",
        "process": "7:cpu,cpuacct:/x\n3:memory:/v1\n0::/job/step\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(free_of_cgroups(tmp_path, tmp_path / "process")) == [1500, 2100]
    assert free_of_cgroups(tmp_path, tmp_path / "none") == []
    limited = (
        "import resource; from core.errors import InputError; from train import device\n"
        "for size in (2**40, 2**31):\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (size, 2**40))\n"
        "    try: print(device.available_bytes('cpu'))\n"
        "    except InputError as error: print(error)\n"
    )
    result = python("-c", limited)
    room, reason = result.stdout.splitlines()
    assert 0 < int(room) < 2**40 and reason.startswith("ulimit -v leaves a process "), result.stderr


def test_torchrun_connects_over_localhost_where_its_name_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "no-such-host.invalid")
    alone = ["torchrun", "--standalone", "train/pretrain.py", "+experiment=demo"]
    for argv, address in (
        (alone, "localhost"),
        (["torchrun", "--nnodes", "2", *alone[2:]], None),
        (["torchrun", "other.py"], None),
    ):
        monkeypatch.setattr(os, "environ", {})
        set_defaults_for_training(argv)
        assert os.environ.get("PET_LOCAL_ADDR") == address, argv
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost")
    set_defaults_for_training(alone)
    assert "PET_LOCAL_ADDR" not in os.environ


def test_torchrun_prints_the_error_once_without_a_traceback() -> None:
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [
        torchrun,
        "--nproc-per-node",
        "2",
        "train/pretrain.py",
        "+experiment=demo",
        "optim.lrr=1",
    ]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    assert (
        result.stderr.count("error: the config has no key optim.lrr; did you mean optim.lr?") == 1
    )


@pytest.mark.parametrize(
    "error", [SignalException("got signal: 2", signal.SIGINT), OSError("disk")]
)
def test_a_signal_leaves_no_traceback_of_torchrun(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["torchrun", "train/pretrain.py"])
    monkeypatch.setattr(sys, "excepthook", lambda *arguments: shown.append(arguments[1]))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # quiet sets torchrun's defaults
    quiet()
    if isinstance(error, OSError):
        sys.excepthook(type(error), error, None)
        assert shown == [error]
    else:
        with pytest.raises(SystemExit) as ended:
            sys.excepthook(type(error), error, None)
        assert ended.value.code == 75 and shown == []


@pytest.mark.parametrize(
    ("command", "message"),
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
def test_commands_report_mistakes_without_a_traceback(command: list[str], message: str) -> None:
    result = forked(*command)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_a_gpu_run_on_slow_kernels_says_why_and_what_to_install(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = run_config("demo")
    ranks = Ranks(0, 1, 0, 1, 0, 1, 0, 1, torch.device("cuda"))
    plan: Any = SimpleNamespace(epochs=lambda: {"web": 0.5})
    with mock.patch.object(
        cuda, "unavailable_reason", lambda: "no cuda-core: pip install 'cuda-core[cu13]'"
    ):
        log_run_summary(config, plan, REFERENCE, ranks, TrainState(0, 0, 0, "", {}))
    lines = capsys.readouterr().out.splitlines()
    assert "warning: the reference kernels are far too slow for a GPU run" in lines
    assert "faster kernels are not used: cuda: no cuda-core: pip install 'cuda-core[cu13]'" in lines
    assert any(line.startswith("faster kernels are not used: mamba_ssm: no ") for line in lines)
