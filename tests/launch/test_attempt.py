"""How a start ended decides what follows: from the run's folder, never from an exit code alone."""

import json
from pathlib import Path

import pytest

from launch.slurm.attempts import begin, end, excluded
from train.resilience.incidents import Outcome


def start(run: Path, lost: tuple[str, ...] = ()) -> None:
    begin(run, ["n1", "n2"], list(lost), run / "bad.txt")


def checkpoint(run: Path, name: str) -> None:
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize("code, verdict", [(0, "done"), (75, "requeue"), (2, "stop")])
def test_the_outcome_counts_and_not_the_exit_code(tmp_path: Path, code: int, verdict: str) -> None:
    start(tmp_path)
    Outcome(code, "why").write(tmp_path)
    assert end(tmp_path, 143, 3, tmp_path / "bad.txt") == (verdict, "why")


def test_an_outcome_of_an_earlier_start_is_not_taken_for_this_one(tmp_path: Path) -> None:
    Outcome(75, "asked to leave").write(tmp_path)
    start(tmp_path)
    verdict, why = end(tmp_path, 1, 3, tmp_path / "bad.txt")
    assert verdict == "requeue" and why.startswith(
        "crash (exit code 1), 1 in a row from the beginning"
    )


def test_crashes_without_a_new_checkpoint_end_a_job(tmp_path: Path) -> None:
    verdicts = []
    for number in range(6):
        start(tmp_path)
        if number == 2:
            checkpoint(tmp_path, "step-00000010")  # progress: the count begins again
        verdicts.append(end(tmp_path, 1, 3, tmp_path / "bad.txt")[0])
        if number == 4:
            break
    assert verdicts == ["requeue", "requeue", "requeue", "requeue", "stop"]


def test_requests_to_leave_are_no_crashes(tmp_path: Path) -> None:
    for _ in range(5):
        start(tmp_path)
        Outcome(75, "preempted").write(tmp_path)
        end(tmp_path, 143, 3, tmp_path / "bad.txt")
    start(tmp_path)
    assert end(tmp_path, 1, 3, tmp_path / "bad.txt")[0] == "requeue"


def test_nodes_are_struck_for_what_they_did(tmp_path: Path) -> None:
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
    end(tmp_path, 1, 3, bad)
    assert excluded(bad, 1) == ["n2"] and excluded(bad, 2) == []
    start(tmp_path)  # and never came to its end: Slurm lost n2, and a node of somebody else's
    start(tmp_path, lost=("n2", "n9"))
    assert excluded(bad, 2) == ["n2"] and "n9" not in bad.read_text()
