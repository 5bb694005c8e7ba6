"""launch/collect.py: the table of a sweep's runs, sorted by loss."""

import csv
import json
from pathlib import Path

import pytest

from core.errors import InputError
from launch.collect import show, sweep_rows
from tests.commands import python
from tests.train.test_report import write_run
from train.resilience.incidents import Outcome


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    points = {
        "a": {"optim.clip_norm": "1.0"},
        "b": {"optim.clip_norm": "0.5"},
        "c": {"optim.clip_norm": "2.0"},
    }
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
    Outcome(0, "all").write(write_run(tmp_path / "a", 0.5))
    write_run(tmp_path / "b", 0.0)
    return tmp_path


def test_rows_have_swept_values_and_results(folder: Path) -> None:
    a, b, c = sweep_rows(folder)
    steps = [json.loads(line) for line in (folder / "a" / "metrics.jsonl").read_text().splitlines()]
    last = [step["loss"] for step in steps if step["tokens"] > 0.95 * 6000]
    assert a["loss"] == pytest.approx(sum(last) / len(last)) and len(last) == 3
    assert (
        a["validation"] == pytest.approx(steps[-1]["loss"])
        and a["skipped"] == 1
        and a["validated_at"] == 6000
        and a["optim.clip_norm"] == "1.0"
    )
    assert (a["state"], b["state"], c["state"]) == ("finished", "running or crashed", "not started")
    with pytest.raises(InputError, match=r"has no sweep\.json"):
        sweep_rows(folder / "a")


def test_texts_in_a_table_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    row = {"tokens": 1, "state": "set [optim.lr] or [/b] :smile:", "a": "[/red]"}
    show(tmp_path / "[bold]x", [row], list(row))
    shown = capsys.readouterr().out
    assert all(text in shown for text in (row["state"], row["a"], "[bold]x"))


def test_the_command_writes_a_table_and_a_plot(folder: Path) -> None:
    (folder / "a" / "eval.json").write_text(
        json.dumps({"heldout": {"all": {"bits_per_byte": 1.25}}})
    )
    result = python("launch/collect.py", folder)
    assert result.returncode == 0, result.stderr
    with (folder / "collected.csv").open() as file:
        # a has been evaluated
        assert [row["run"] for row in csv.DictReader(file)] == ["a", "b", "c"]
    assert "1.2500" in result.stdout and "running or crashed" in result.stdout
    page = (folder / "collected.html").read_text()
    assert "<h2>a</h2>" in page and "<h2>b</h2>" in page and "<h2>c</h2>" not in page
