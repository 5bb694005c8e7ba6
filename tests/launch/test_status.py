"""launch/status.py: a line a run, from the ends of its files."""

import json
import os
import time
from pathlib import Path

import pytest

from core.records import TAIL_BYTES, Damage, read_newest_lines
from core.run import RunFiles
from launch import status
from tests.commands import python
from tests.train.test_report import write_run
from train.metrics.records import LINE
from train.resilience.incidents import Outcome


def with_stages(folder: Path) -> Path:
    """Write the stages' tokens, as every start does: 100 blocks and a part of one."""
    stages = [{"name": "short", "tokens": 10_050, "mixture": {"web": 1}}]
    record = {"data": {"stages": stages, "block_tokens": 100}}
    RunFiles(folder).config.write_text(json.dumps(record))
    return folder


def test_a_running_run(tmp_path: Path) -> None:
    run = with_stages(write_run(tmp_path / "one", 0.0))
    RunFiles(run).lock.touch()
    cells = status.row(run, {"one": "train running"})
    expected = {
        **{"run": "one", "state": "running", "step": "60", "tokens": "6k of 10k"},
        **{"loss": "2.149", "held-out": "2.149 at 6k", "tok/s": "110", "queue": "train running"},
        **{"last save": "60, 0 s ago", "incidents": "1, last crash"},
    }
    assert {key: cells[key] for key in expected} == expected and cells["ends"].endswith("Z")
    past = time.time() - 600  # nobody renews the lock
    os.utime(RunFiles(run).lock, (past, past))
    assert status.row(run, {})["state"] == "crashed" and "ends" not in status.row(run, {})
    Outcome(2, "lower optim.lr").write(run)
    assert status.row(run, {})["state"] == "failed: lower optim.lr"


def test_damaged_files_cost_a_word(tmp_path: Path) -> None:
    run = with_stages(write_run(tmp_path / "one", 0.0))
    files = RunFiles(run)
    with files.metrics.open("a") as file:
        file.write('{"step": 61, "tok')  # being written
    assert status.row(run, {})["state"] == "crashed"
    with files.metrics.open("a") as file:
        file.write("\n")
    files.config.write_bytes(b"\xff{")
    files.outcome.write_text("[]")
    files.incidents.unlink()
    files.incidents.mkdir()
    cells = status.row(run, {})
    assert cells["state"] == "damaged (metrics.jsonl, config.yaml damaged)"
    assert (cells["tokens"], cells["incidents"], cells["step"]) == ("6k", "damaged", "60")
    files.metrics.unlink()
    files.metrics.mkdir()
    assert status.row(run, {})["state"].endswith("(metrics.jsonl, config.yaml damaged)")


def test_gigabytes_are_not_read(tmp_path: Path) -> None:
    run = with_stages(write_run(tmp_path / "one", 0.0))
    metrics = RunFiles(run).metrics
    lines = metrics.read_bytes()
    with metrics.open("r+b") as file:
        file.seek(2**33)  # a hole, which takes no space
        file.write(b"\n" + lines)
    started_at = time.process_time()
    assert status.row(run, {})["step"] == "60"
    assert time.process_time() - started_at < 5


def test_lines_across_blocks_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": n, "tokens": n, "scores": {"s" * 300: {}}} for n in range(3000)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert path.stat().st_size > 3 * TAIL_BYTES
    damage = Damage(path)
    assert [*read_newest_lines(path, LINE, damage, 2**30)] == records[::-1] and not damage.count
    assert len([*read_newest_lines(path, LINE, damage, 2 * TAIL_BYTES)]) < 2000


def test_queue_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\necho 'a-b-train|RUNNING|None'\necho 'a-b-eval|PENDING|Dependency'\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert status.slurm_queue() == {"a-b": "train running, eval pending (Dependency)"}
    monkeypatch.setenv("PATH", "/nowhere")
    assert status.slurm_queue() == {}


def test_the_command_prints_a_line_a_run(tmp_path: Path) -> None:
    runs = [with_stages(write_run(tmp_path / name, 0.0)) for name in ("one", "two")]
    result = python("launch/status.py", *runs)
    assert result.returncode == 0 and [line.split()[0] for line in result.stdout.splitlines()] == [
        *("run", "one", "two")
    ]
    result = python("launch/status.py", tmp_path / "three")
    assert result.returncode == 2 and "name folders of runs" in result.stderr
