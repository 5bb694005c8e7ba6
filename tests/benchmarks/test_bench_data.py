"""The data benchmark runs from end to end on small sizes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.data", "--small", "--no-record"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for what in (
        "random sequences",
        "megatron-core IndexedDataset",
        "datatrove folder dataset",
        "encode_batch",
        "seek",
    ):
        assert what in result.stdout, what
