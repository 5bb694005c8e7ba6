"""Profiler: its table, its trace, and that profiling does not change losses."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from time import thread_time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.corpus import make_corpus
from tests.small import config
from train.config import ProfileConfig, Train
from train.metrics.profiler import (
    MODEL,
    PREFIX,
    ROWS,
    exposed_comm_seconds,
    format_table,
    merge_intervals,
    seconds_by_phase,
    subtract_intervals,
)
from train.metrics.records import read_lines
from train.run_context import start


def event(name: str, begin: float, end: float, category: str, thread: int = 1) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "ts": 1000 + begin,
        "dur": end - begin,
        "tid": thread,
    }


def test_merge_and_subtract_intervals() -> None:
    assert merge_intervals([(4.0, 5.0), (1.0, 3.0), (2.0, 3.5)]) == [(1.0, 3.5), (4.0, 5.0)]
    others = [(1.0, 2.0), (8.0, 22.0), (29.0, 31.0)]
    remaining = [(0.0, 1.0), (2.0, 8.0), (22.0, 29.0)]
    assert subtract_intervals([(0.0, 10.0), (20.0, 30.0)], others) == remaining
    assert subtract_intervals([(1.0, 2.0)], []) == [(1.0, 2.0)]
    assert subtract_intervals([(1.0, 2.0)], [(0.0, 3.0)]) == []


def test_exposed_comm_of_a_gpu_is_nccl_without_other_kernels() -> None:
    """Backward 100-300 us: all-reduce 150-260, hidden 150-200; update 300-400: gather 350-380."""
    events = [
        event(PREFIX + "backward", 100, 300, "user_annotation"),
        event("ncclDevKernel_AllReduce_Sum", 150, 260, "kernel", 20),
        event("gemm", 100, 200, "kernel", 7),
        event("ncclDevKernel_AllGather", 350, 380, "kernel", 20),
        event("gloo:all_reduce", 100, 400, "cpu_op"),  # on the host: ignored
        {"ph": "i", "name": "instant", "ts": 1100},
    ]
    exposed = exposed_comm_seconds(events, [("backward", 0.0, 200e-6), ("update", 200e-6, 300e-6)])
    assert exposed == pytest.approx({"backward": 60e-6, "update": 30e-6})


def test_exposed_comm_of_a_cpu_is_gloo_without_operators_of_the_loop() -> None:
    events = [
        event(PREFIX + "backward", 100, 300, "user_annotation"),
        event("gloo:all_reduce", 150, 260, "cpu_op", 9),
        event("aten::mm", 100, 170, "cpu_op"),
        event("aten::mm", 100, 300, "cpu_op", 2),  # another thread: ignored
    ]
    assert exposed_comm_seconds(events, [("backward", 0.0, 200e-6)]) == pytest.approx(
        {"backward": 90e-6}
    )


def test_table_moves_exposed_comm_to_reduce_and_keeps_the_sum() -> None:
    timed = [
        ("read", 0.0, 1.0),
        ("forward", 1.0, 3.0),
        ("backward", 3.0, 9.0),
        ("update", 9.0, 9.5),
        ("log", 9.5, 10.0),
    ]
    traced = [("backward", 0.0, 8.0), ("update", 8.0, 9.0)]
    rows = seconds_by_phase(
        timed, traced, {"backward": 4.0, "update": 0.5, "reduce_stats": 1.0}, steps=2
    )
    assert rows["reduce"] == pytest.approx((3.0 + 0.25) / 2) and rows["backward"] == pytest.approx(
        1.5
    )
    assert sum(rows.values()) == pytest.approx(5.0)
    text = format_table("title", rows)
    assert text.splitlines()[-1].endswith("15.00%")  # data and log
    assert "reduce         1625.00   32.5%" in text


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiler")
    make_corpus(folder / "data")
    start(config(folder, "plain"), "cpu")
    return folder


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_lines(folder / "metrics.jsonl")]


def test_run_writes_trace_and_table_and_keeps_its_losses(
    root: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # processor time, so that shares do not depend on the load of the machine
    monkeypatch.setattr("train.metrics.profiler.time", SimpleNamespace(perf_counter=thread_time))
    run = replace(
        config(root, "profiled"),
        train=Train(ProfileConfig(steps=2, after_steps=1, timed_steps=4, ranks=[0])),
    )
    start(run, "cpu")
    assert losses(root / "profiled") == losses(root / "plain")
    (path,) = (root / "profiled" / "profile").glob("*.trace.json.gz")
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [entry["name"] for entry in events if entry.get("cat") == "user_annotation"]
    assert {
        names.count(PREFIX + ROWS[phase])
        for phase in ("read", "update", "reduce_stats", "log", "check")
    } == {2}
    # needed for the exposed communication
    assert any(entry["name"].startswith("gloo:") for entry in events)
    text = path.with_name(path.name.replace(".trace.json.gz", ".txt")).read_text()
    assert (
        text.splitlines()[0] == "steps 2 to 5 of rank 0 by phase"
        and text in capsys.readouterr().out
    )
    rows = [line.rsplit(maxsplit=2) for line in text.splitlines()[2:12]]
    shares = {phase.strip(): float(share[:-1]) for phase, _, share in rows}
    assert set(shares) == set(ROWS.values()) and sum(shares.values()) == pytest.approx(100, abs=0.6)
    assert sum(shares[ROWS[phase]] for phase in MODEL) > 50


def test_warning_if_a_run_ends_before_its_profile_only_on_profiled_ranks(
    root: Path, capsys: Any
) -> None:
    steps = len(losses(root / "plain"))
    profile = ProfileConfig(steps=1, after_steps=steps, timed_steps=0, ranks=[0])
    start(replace(config(root, "short"), train=Train(profile)), "cpu")
    assert f"no profile: this start ended before its {steps + 1} steps" in capsys.readouterr().out
    start(replace(config(root, "other"), train=Train(replace(profile, ranks=[1]))), "cpu")
    assert "no profile" not in capsys.readouterr().out and not (root / "other" / "profile").exists()


def test_last_step_of_a_run_can_be_profiled(root: Path) -> None:
    steps = len(losses(root / "plain"))
    start(replace(config(root, "end"), train=Train(ProfileConfig(1, steps - 1, 0, [0]))), "cpu")
    assert list((root / "end" / "profile").glob(f"step-{steps:08d}-rank-00000.txt"))


def test_invalid_profile_configs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.profile\.ranks is empty"):
        ProfileConfig(1, 0, 0, [])
