"""Both benchmarks run from end to end on small sizes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["benchmarks.cpu", "--lengths", "16", "--no-record"],
        ["benchmarks.gpu", "--device", "cpu", "--small", "--no-record"],
    ],
    ids=["cpu", "gpu"],
)
def test_it_runs(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "times ours" in result.stdout and "scan, forward and backward" in result.stdout
    if "benchmarks.gpu" in command:
        missing = [line for line in result.stdout.splitlines() if line.startswith("not measured: ")]
        assert {line.split()[2] for line in missing} == {
            "jax-linear-attention",
            "Liger",
            "transformers'",
        }, missing
        for what in (
            "transformers' FalconMamba",
            "Llama's layer",
            "1 of 2 ranks, megatron, bf16, recompute full",
        ):
            assert what in result.stdout, what
        assert "largest memory allocated not measured on a CPU, planned" in result.stdout
