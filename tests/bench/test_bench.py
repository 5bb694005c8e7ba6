"""Both benchmarks run from end to end on small sizes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["tests.bench.cpu", "--lengths", "16", "--no-record"],
        ["tests.bench.gpu", "--device", "cpu", "--small", "--no-record"],
    ],
    ids=["cpu", "gpu"],
)
def test_it_runs(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "times ours" in result.stdout and "scan, forward and backward" in result.stdout
