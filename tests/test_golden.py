"""The golden losses of tests/golden, in a process of its own: it fixes the instruction set before torch is loaded."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_golden_losses_are_kept() -> None:
    command = [sys.executable, "-m", "tests.golden"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "all golden losses are equal" in result.stdout
