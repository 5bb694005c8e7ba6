"""Scores of evaluation jobs: which checkpoints are scored, and that every score is recorded."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from core.run import MANIFEST, Run
from eval.config import JobsConfig, Launcher
from eval.leaderboard.jobs import SuiteJobs
from model.checkpoint import STATE
from tests.commands import TIMEOUT_SECONDS
from tests.corpus import make_corpus
from tests.small import config
from tests.train.test_metrics import record, scalars, throughput
from tests.train.world import train
from train.config import MetricsConfig
from train.metrics.page import page
from train.metrics.records import read_lines, read_scores
from train.metrics.scores import collect
from train.metrics.sinks import Metrics
from train.metrics.trackers import Wandb
from train.resilience.run_lock import RunLock

SUITES = ["v1", "v2"]


def write_checkpoint(run: Path, step: int, tokens: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state = {"format": 1, "tokens": tokens, "step": step, "updates": step, "plan": "", "model": {}}
    (folder / STATE).write_text(json.dumps(state))
    (folder / MANIFEST).write_text("{}")
    return folder


def write_result(run: Path, suite: str, step: int, score: float, **extra: Any) -> None:
    scores = {"ARC": score, "GSM8K": score + 2}
    rows = {label: {"row": {}, "score": value, "stderr": None} for label, value in scores.items()}
    body = {"suite": suite, "complete": True, "rows": rows, **extra}
    (run / "scores" / f"{suite}-step-{step:08d}.json").write_text(json.dumps(body))


def write_finished_run(run: Path, tensorboard: bool = False) -> list[str]:
    """Write the folder of a finished run with jobs on two checkpoints."""
    started = {"step-00000004": 256, "step-00000009": 576}
    (run / "scores").mkdir(parents=True)
    (run / "scores" / "jobs.json").write_text(json.dumps({"started": started}))
    jobs = {
        "suites": SUITES,
        "every_tokens": 100,
        "launcher": "local",
        "sbatch": [],
        "overrides": [],
    }
    metrics = {"wandb_project": None, "tensorboard": tensorboard, "console_seconds": 1.0}
    config = {"run": {"name": "r", "seed": 0}, "metrics": metrics, "eval": {"jobs": jobs}}
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(record(step)) + "\n" for step in range(1, 10))
    )
    return list(started)


def test_which_checkpoints_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First after each multiple of every_tokens, last before the decay, last of the run."""
    launched: list[int] = []
    monkeypatch.setattr(
        SuiteJobs, "_launch", lambda self, suite, pinned: launched.append(int(pinned.name[5:]))
    )
    jobs = SuiteJobs(
        Run("r", str(tmp_path), 0),
        JobsConfig(SUITES[:1], 1000, Launcher.local, [], []),
        always={1600, 1900},
    )
    for step, tokens in ((1, 500), (2, 1100), (3, 1500)):
        write_checkpoint(tmp_path, step, tokens)
    assert jobs.poll() == [] and launched == [2]
    for step, tokens in ((4, 1600), (5, 1700), (6, 1900)):  # all before the next poll
        write_checkpoint(tmp_path, step, tokens)
    assert jobs.poll() == [] and launched == [2], "it has just polled"
    assert jobs.poll(now=True) == [] and launched == [2, 4, 6]
    restarted = SuiteJobs(jobs.run, jobs.settings, always=jobs.always)
    assert restarted.poll() == [] and launched == [2, 4, 6]


@pytest.mark.fault("a full disk when evaluation jobs start", "training goes on, they start later")
def test_a_full_disk_delays_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each write: the checkpoint's links, their sync, and the list of jobs."""
    launched: list[str] = []
    monkeypatch.setattr(
        SuiteJobs, "_launch", lambda self, suite, pinned: launched.append(pinned.name)
    )

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    module = "eval.leaderboard.jobs."
    jobs = SuiteJobs(Run("r", str(tmp_path), 0), JobsConfig(["v1"], 9, Launcher.local, [], []))
    for step, name in enumerate(("make_folder", "shutil.copytree", "sync_folder", "write_json"), 1):
        write_checkpoint(tmp_path, step, 10 * step)
        with monkeypatch.context() as patch:
            patch.setattr(module + name, full)
            assert jobs.poll(now=True) == [] and len(launched) == step - 1
        assert jobs.poll(now=True) == [] and launched[-1] == f"step-{step:08d}"
    assert len(launched) == 4


def test_scores_of_each_checkpoint_are_collected_once(tmp_path: Path) -> None:
    """Two checkpoints at one poll; a suite with rows that cannot be scored counts as complete."""
    write_finished_run(tmp_path)
    pinned = tmp_path / "scores" / "held" / "step-00000004"
    pinned.mkdir(parents=True)
    write_result(tmp_path, "v1", 4, 30.0)
    write_result(tmp_path, "v1", 9, 50.0)
    jobs = SuiteJobs(Run("r", str(tmp_path), 0), JobsConfig(SUITES, 100, Launcher.local, [], []))
    first = jobs.collect()
    assert [(r["step"], r["tokens"]) for r in first] == [(4, 256), (9, 576)]
    assert first[0]["scores"] == {"v1": {"ARC": 30.0, "GSM8K": 32.0, "average": 31.0}}
    assert jobs.collect() == [] and pinned.exists()
    write_result(tmp_path, "v2", 4, 7.0, complete=False)
    assert jobs.collect() == [], "the job still runs"
    write_result(tmp_path, "v2", 4, 7.0, complete=False, missing={"MATH": "no dataset"})
    assert jobs.collect() == [
        {"step": 4, "tokens": 256, "scores": {"v2": {"ARC": 7.0, "GSM8K": 9.0}}}
    ]
    assert not pinned.exists()


def test_job_that_ends_after_the_run_writes_its_scores(tmp_path: Path, capsys: Any) -> None:
    write_finished_run(tmp_path, tensorboard=True)
    assert collect(tmp_path) == 0
    write_result(tmp_path, "v1", 4, 30.0)
    write_result(tmp_path, "v1", 9, 50.0)
    assert collect(tmp_path) == 2 and collect(tmp_path) == 0
    output = capsys.readouterr().out
    assert "v1 at step 9, 576 tokens:  ARC 50.00  GSM8K 52.00  average 51.00" in output
    path = tmp_path / "metrics.jsonl"
    assert [line["step"] for line in read_lines(path)] == list(range(1, 10))
    assert [(line["step"], line["scores"]["v1"]["average"]) for line in read_scores(path)] == [
        (4, 31.0),
        (9, 51.0),
    ]
    assert scalars(tmp_path / "tensorboard")["scores/v1/ARC"] == [(256, 30.0), (576, 50.0)]
    with pytest.raises(InputError, match="name the folder of a run"):
        collect(tmp_path / "scores")


def test_running_run_collects_its_scores_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job waits while the folder is locked, then writes the scores that are left."""
    monkeypatch.setattr("train.metrics.scores.RETRY_SECONDS", 0.05)
    write_finished_run(tmp_path)
    write_result(tmp_path, "v1", 4, 30.0)
    run_lock = RunLock(tmp_path)
    run_lock.acquire()
    counts: list[int] = []
    job = threading.Thread(target=lambda: counts.append(collect(tmp_path)))
    job.start()
    time.sleep(0.3)
    assert not counts and not read_scores(tmp_path / "metrics.jsonl")
    run_lock.release()
    job.join(TIMEOUT_SECONDS)
    assert counts == [1]
    monkeypatch.setattr("train.metrics.scores.MAX_WAIT_SECONDS", 0.1)
    write_result(tmp_path, "v1", 9, 50.0)
    run_lock.acquire()
    assert collect(tmp_path) == 0
    run_lock.release()


def test_restart_keeps_scores_up_to_its_tokens(
    tmp_path: Path,
) -> None:
    def scored(step: int) -> dict[str, Any]:
        return {"step": step, "tokens": 64 * step, "scores": {"v1": {"ARC": 1.0}}}

    metrics = Metrics(
        tmp_path, "r", MetricsConfig(None, False, 60.0), {}, throughput(), tokens=0, total=6400
    )
    for step in range(1, 8):
        metrics.log(record(step), "")
    metrics.log_scores(scored(2))  # logged at step 7
    metrics.log_scores(scored(6))
    metrics.close()
    again = Metrics(
        tmp_path, "r", MetricsConfig(None, False, 60.0), {}, throughput(), tokens=3 * 64, total=6400
    )
    again.close()
    path = tmp_path / "metrics.jsonl"
    assert [r["step"] for r in read_lines(path)] == [1, 2, 3] and [
        r["step"] for r in read_scores(path)
    ] == [2]


def test_wandb_gets_scores_at_the_tokens_of_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of W&B can only increase, so scores have their own axis."""

    class Remote:
        config: dict[str, Any] = {}
        calls: list[tuple[str, Any, Any]] = []

        def define_metric(self, name: str, step_metric: str) -> None:
            self.calls.append(("axis", name, step_metric))

        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            self.calls.append(("log", values, step))

        def finish(self) -> None: ...

    remote = Remote()
    remote.config = type("Config", (), {"update": lambda *a, **b: None})()  # type: ignore[assignment]
    monkeypatch.setattr(Wandb, "_start", lambda self: remote)
    sink = Wandb(MetricsConfig("project", False, 60.0), "r", tmp_path, {})
    scores = {"step": 4, "tokens": 256, "scores": {"v1": {"ARC": 30.0}}}
    sink.log(scores)  # from a job that ends after the run
    sink.log(record(9))
    sink.log({**scores, "step": 8, "tokens": 512})
    sink.close()
    axes = [call for call in remote.calls if call[0] == "axis"]
    assert axes == [("axis", "*", "tokens"), ("axis", "scores/v1/ARC", "scores/tokens")]
    logged = [call[1:] for call in remote.calls if call[0] == "log"]
    assert logged[0] == ({"scores/v1/ARC": 30.0, "scores/tokens": 256}, None)
    assert logged[1][1] == 9 and logged[2] == ({"scores/v1/ARC": 30.0, "scores/tokens": 512}, 9)


def test_run_is_scored_before_the_decay_and_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose jobs end at once: both checkpoints are in its records and on its page."""

    def score(self: SuiteJobs, suite: str, pinned: Path) -> None:
        step = int(pinned.name[5:])
        assert (pinned / MANIFEST).is_file() and "train/collect_scores.py" in self.then[1]
        write_result(self.run.folder, suite, step, float(step))

    monkeypatch.setattr(SuiteJobs, "_launch", score)
    make_corpus(tmp_path / "data")
    run = config(tmp_path, "scored")
    run.leaderboard = replace(
        run.leaderboard, jobs=JobsConfig(["v1"], 10**9, Launcher.local, [], [])
    )
    run.metrics = MetricsConfig(None, False, 60.0)
    train(run)
    path = run.run.folder / "metrics.jsonl"
    scores = read_scores(path)
    end = run.data.tokens_of(run.data.stages[0]) + run.data.tokens_of(run.data.stages[1])
    assert [r["tokens"] for r in scores] == [end, read_lines(path)[-1]["tokens"]]
    assert [r["scores"]["v1"]["ARC"] for r in scores] == [float(r["step"]) for r in scores]
    text = page([run.run.folder], tmp_path / "page.html").read_text()
    assert f"<th>{end:,} tokens</th>" in text and f"<td>{float(scores[0]['step']):.2f}</td>" in text
