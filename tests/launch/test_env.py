"""launch/env.sh: defaults, a reason for every setting, and its place in the batch script."""

import re
import subprocess
from pathlib import Path

from launch.jobs.sweep import compose_job
from launch.slurm.script import render
from tests.commands import TIMEOUT_SECONDS

ENV = Path(__file__).resolve().parents[2] / "launch" / "env.sh"


def environment(**variables: str) -> dict[str, str]:
    """The environment after env.sh."""
    command = ["bash", "-euo", "pipefail", "-c", f". {ENV}; env"]
    path = {"PATH": "/usr/bin:/bin"}
    text = subprocess.run(
        command,
        env=path | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_SECONDS,
    ).stdout
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_defaults_do_not_override() -> None:
    assert (
        environment()["NCCL_DEBUG"] == "WARN"
        and environment(NCCL_DEBUG="INFO")["NCCL_DEBUG"] == "INFO"
    )
    assert environment(LOGS="/logs")["TORCH_FR_DUMP_TEMP_FILE"] == "/logs/nccl-rank-"


def test_one_queue_with_tensor_parallelism_only() -> None:
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment() | environment(TENSOR_PARALLEL="1")
    assert environment(TENSOR_PARALLEL="2")["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_every_setting_has_a_reason() -> None:
    for block in ENV.read_text().split("\n\n")[2:]:
        lines = block.strip().splitlines()
        assert lines[0].startswith("#"), lines[0]
    assert len(re.findall(r"\bdefault [A-Z]", ENV.read_text())) == 7


def test_the_batch_script_reads_it_where_the_layout_is_known() -> None:
    text = render(
        compose_job(["+experiment=7b", "parallel.tensor_parallel=8"]), "train", "train/pretrain.py"
    )
    source = text.index('. "$ROOT/launch/env.sh"')
    assert text.index("TENSOR_PARALLEL=8") < source < text.index("\nsrun ")
