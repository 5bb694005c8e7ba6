"""Golden losses; tests.golden runs in its own process to fix the instruction set before torch."""

from pathlib import Path

import pytest

from tests.commands import python
from tests.golden import __main__ as golden


def test_golden_losses_are_kept() -> None:
    result = python("-m", "tests.golden")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert (
        "all golden losses are equal to the last digit" in result.stdout
        or "within 0.0002 of" in result.stdout
    )


def test_figures_of_another_machine_are_compared_with_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    (tmp_path / "run.txt").write_text("# a machine torch 1\n1 2.0 3.0\n")
    assert golden.differences("run", ["1 2.0001 2.9999"]) == []
    assert (
        golden.report(["run"])
        == "all golden losses are within 0.0002 of those of a machine torch 1"
    )
    for line in ("1 2.001 3.0", "1 nan 3.0", "1 2.0 inf"):
        assert golden.differences("run", [line]) == [
            f"run (another machine): {line} instead of 1 2.0 3.0"
        ]


def test_figures_of_the_same_machine_are_compared_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    (tmp_path / "run.txt").write_text(f"{golden.machine()}\n1 2.0 3.0\n")
    assert golden.differences("run", ["1 2.0 3.0"]) == []
    assert golden.report(["run"]) == "all golden losses are equal to the last digit"
    assert golden.differences("run", ["1 2.0 3.0000001"]) == [
        "run: 1 2.0 3.0000001 instead of 1 2.0 3.0"
    ]
