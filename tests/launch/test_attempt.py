"""Requeue decisions come from the run's folder, not from exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm import attempts
from launch.slurm.attempts import excluded_nodes, record_end, record_start
from tests.commands import ROOT
from train.resilience.incidents import Outcome


def start(run: Path, down_nodes: tuple[str, ...] = ()) -> None:
    record_start(run, ["n1", "n2"], list(down_nodes), run / "bad.txt")


def commit_checkpoint(run: Path, name: str) -> None:
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize("code, verdict", [(0, "done"), (75, "requeue"), (2, "stop")])
def test_the_outcome_decides_and_not_the_exit_code(tmp_path: Path, code: int, verdict: str) -> None:
    start(tmp_path)
    Outcome(code, "why").write(tmp_path)
    assert record_end(tmp_path, 143, 3, tmp_path / "bad.txt") == (verdict, "why")


@pytest.mark.parametrize("code, verdict", [(0, "done"), (75, "requeue"), (2, "stop")])
def test_the_exit_code_decides_where_a_full_disk_left_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, verdict: str
) -> None:
    """Not even attempts.jsonl can be written; a crash that cannot be counted is not repeated."""

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(attempts, "append_json_line", full)
    assert record_end(tmp_path, code, 3, tmp_path / "bad.txt")[0] == verdict
    crash, reason = record_end(tmp_path, 1, 3, tmp_path / "bad.txt")
    assert crash == "stop" and "attempts.jsonl cannot be written" in reason


def test_an_outcome_of_an_earlier_start_is_ignored(tmp_path: Path) -> None:
    Outcome(75, "stop requested").write(tmp_path)
    start(tmp_path)
    verdict, reason = record_end(tmp_path, 1, 3, tmp_path / "bad.txt")
    assert verdict == "requeue"
    assert reason.startswith("crash (exit code 1), 1 in a row since the beginning")


def test_crashes_without_a_new_checkpoint_stop_a_job(tmp_path: Path) -> None:
    verdicts = []
    for number in range(6):
        start(tmp_path)
        if number == 2:
            commit_checkpoint(tmp_path, "step-00000010")  # progress resets the count
        verdicts.append(record_end(tmp_path, 1, 3, tmp_path / "bad.txt")[0])
        if number == 4:
            break
    assert verdicts == ["requeue", "requeue", "requeue", "requeue", "stop"]


def test_an_error_of_the_record_is_one_line(tmp_path: Path) -> None:
    """The batch script stops, and its log says why."""
    script = [sys.executable, str(ROOT / "launch" / "attempt.py")]
    (tmp_path / "attempts.jsonl").mkdir()
    for words, restart, line in (
        (["end", "--code", "1"], "0", "attempts.jsonl cannot be read (it is no regular file)"),
        (["excluded"], "0", "slurm.bad_nodes_file"),
        (["begin"], "x", "SLURM_RESTART_COUNT is 'x' in the environment"),
    ):
        result = subprocess.run(
            [*script, words[0], str(tmp_path), *words[1:], "--bad-nodes", str(tmp_path)],
            env={**os.environ, "SLURM_RESTART_COUNT": restart},
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ") and line in result.stderr
        assert result.stderr.count("\n") == 1


def test_requeues_do_not_count_as_crashes(tmp_path: Path) -> None:
    for _ in range(5):
        start(tmp_path)
        Outcome(75, "preempted").write(tmp_path)
        record_end(tmp_path, 143, 3, tmp_path / "bad.txt")
    start(tmp_path)
    assert record_end(tmp_path, 1, 3, tmp_path / "bad.txt")[0] == "requeue"


def test_strikes_against_crashed_and_lost_nodes(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    start(tmp_path)
    lines = [
        ("crash", "rank 1 on n2: CUDA error"),
        ("lost a peer", "rank 0 on n1: Connection closed by peer"),
    ]
    for kind, text in lines:
        with (tmp_path / "incidents.jsonl").open("a") as file:
            file.write(
                json.dumps({"time": "2999-01-01T00:00:00Z", "incident": kind, "text": text}) + "\n"
            )
    record_end(tmp_path, 1, 3, bad)
    assert excluded_nodes(bad, 1) == ["n2"] and excluded_nodes(bad, 2) == []
    start(tmp_path)  # without an end, since n2 went down; n9 is not a node of this run
    start(tmp_path, down_nodes=("n2", "n9"))
    assert excluded_nodes(bad, 2) == ["n2"] and "n9" not in bad.read_text()
