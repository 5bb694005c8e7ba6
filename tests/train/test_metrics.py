"""Metrics: metrics.jsonl, trackers, console and throughput."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import psutil
import pytest
import torch
import wandb
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.credentials import has_wandb_key
from core.errors import InputError
from core.units import end_time, short
from tests.commands import TIMEOUT_SECONDS
from tests.compose import typed
from train.config import Cluster, Device, MetricsConfig, Precision, RunConfig
from train.device import peak_flops
from train.metrics.console import LOG_COLUMNS, LiveConsole, PlainConsole
from train.metrics.curves import draw
from train.metrics.records import JsonLines, read_lines
from train.metrics.sinks import Metrics
from train.metrics.throughput import Throughput
from train.metrics.trackers import (
    ACCELERATED,
    Accelerated,
    Tracker,
    Wandb,
    check_trackers,
    flatten,
)


def record(step: int, **extra: Any) -> dict[str, Any]:
    fields = {
        "stage": "a",
        "loss": 5.0,
        "source_loss": {"web": 5.0},
        "lr": 1e-3,
        "batch": 4,
        "seq_len": 16,
    }
    rates = {"grad_norm": 1.0, "skipped": False, "step_seconds": 6.4, "data_wait_seconds": 0.0}
    return {"step": step, "tokens": step * 64} | fields | rates | extra


def throughput(peak_flops: float | None = None) -> Throughput:
    return Throughput(ranks=1, flops_per_token=1.0, peak_flops=peak_flops)


def test_restart_drops_later_records_and_a_truncated_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, tokens=0)
    for step in (1, 2, 3):
        first.write(record(step))
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "tok')  # killed while writing
    second = JsonLines(path, tokens=128)
    second.write(record(3, loss=4.0))
    second.close()
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [
        (1, 5.0),
        (2, 5.0),
        (3, 4.0),
    ]


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "m.jsonl", 0)
    sink.write(record(1, loss=float("nan"), source_loss={"web": float("inf")}))
    line = json.loads(
        (tmp_path / "m.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert line["loss"] is None and line["source_loss"] == {"web": None}


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A W&B server that does not answer; its timeout is short, that of the local service is not."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(Wandb, "ANSWER_SECONDS", TIMEOUT_SECONDS)
    init = wandb.init

    def init_with_timeout(mode: str, settings: wandb.Settings, **arguments: Any) -> Any:
        settings.init_timeout = 2.0 if mode == "online" else TIMEOUT_SECONDS
        return init(mode=mode, settings=settings, **arguments)

    monkeypatch.setattr(wandb, "init", init_with_timeout)


@pytest.mark.usefixtures("unreachable")
def test_unreachable_wandb_does_not_delay_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wandb, "CLOSE_SECONDS", 0.1)
    start = Wandb._start
    server_timeout = threading.Event()
    monkeypatch.setattr(Wandb, "_start", lambda self: (server_timeout.wait(), start(self))[1])
    config = MetricsConfig("project", False, 0.0)
    metrics = Metrics(tmp_path, "run", config, {"a": {"b": 1}}, throughput(), tokens=0, total=6400)
    for step in range(1, 101):
        metrics.log(record(step), "no checkpoint yet")
    metrics.close()
    thread = metrics.trackers[0].thread
    assert thread.is_alive(), "logging or closing waited for W&B"
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 100
    server_timeout.set()
    thread.join(TIMEOUT_SECONDS)  # another test starts W&B in this process
    assert not thread.is_alive()
    assert "0" * 40 not in "".join(
        p.read_text(errors="ignore") for p in tmp_path.rglob("*") if p.is_file()
    )


@pytest.mark.usefixtures("unreachable")
def test_unreachable_wandb_keeps_every_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Wandb, "CLOSE_SECONDS", TIMEOUT_SECONDS)
    sink = Wandb(MetricsConfig("project", False, 60.0), "a/b:c", tmp_path, {})
    for step in range(1, 21):
        sink.log(record(step, marker=f"record-{step}"))
    sink.close()
    assert not sink.thread.is_alive()
    alive = [child.name() for child in psutil.Process().children(recursive=True)]
    assert not [name for name in alive if "wandb" in name], (
        "W&B's service may not have written all records"
    )
    output = capsys.readouterr().out
    assert "logging offline" in output and "W&B is disabled" not in output
    stored = b"".join(
        path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    )
    assert all(f"record-{step}".encode() in stored for step in range(1, 21))


def test_wandb_writes_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(Wandb, "CLOSE_SECONDS", TIMEOUT_SECONDS)
    for step in (1, 2):  # a start, and a restart
        sink = Wandb(
            MetricsConfig("project", False, 60.0),
            "run",
            tmp_path,
            {"a": 1, "code": {"commit": "c0ffee" * 6, "dirty": True}},
        )
        sink.log(record(step))
        sink.close()
        assert not sink.thread.is_alive()
    paths = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert all(b"c0ffee" * 6 in path.read_bytes() for path in paths), (
        "the commit is part of the config"
    )
    assert len(paths) == 2 and len({path.name for path in paths}) == 1, (
        "both starts are one run of W&B"
    )
    assert capsys.readouterr().out.count(f"W&B: logging offline in {tmp_path / 'wandb'}") == 2


def test_wandb_takes_its_key_from_netrc_and_says_where_it_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    netrc.write_text("no netrc")
    assert not has_wandb_key()
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {'0' * 40}\n")
    given: dict[str, Any] = {}

    def init(**arguments: Any) -> MagicMock:
        given.update(arguments)
        return MagicMock(url="https://wandb.ai/team/project/runs/run-1")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    config = MetricsConfig("project", False, 60.0, [], "team", "sweep", ["a", "b"])
    Wandb(config, "run", tmp_path, {}).close()
    names = ("mode", "project", "entity", "group", "tags")
    assert [given[name] for name in names] == ["online", "project", "team", "sweep", ["a", "b"]]
    assert "W&B: https://wandb.ai/team/project/runs/run-1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["demo", "130m", "1b", "7b"])
def test_a_key_alone_uploads_no_demo(name: str) -> None:
    project = typed(RunConfig, name).metrics.wandb_project
    assert project == (None if name == "demo" else "falcon-mamba")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of each tag that TensorBoard shows of a folder."""
    events = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_numbers_over_tokens_and_a_restart_purges_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MetricsConfig(None, True, 60.0)
    now = time.time
    monkeypatch.setattr(Tracker, "CLOSE_SECONDS", TIMEOUT_SECONDS)
    for begin, end, loss in ((0, 5, 5.0), (3, 7, 4.0)):  # the second start continues from step 3
        run_config = {"model": {"n_layer": 64}}
        rates = throughput(peak_flops=100.0)
        metrics = Metrics(tmp_path, "run", config, run_config, rates, tokens=64 * begin, total=6400)
        for step in range(begin + 1, end + 1):
            metrics.log(
                record(step, loss=float("nan") if step == 2 else loss, source_tokens={"web": 64}),
                "",
            )
        metrics.close()
        # TensorBoard orders files by the second in their names
        monkeypatch.setattr(time, "time", lambda: now() + 10)
    values = scalars(tmp_path / "tensorboard")
    expected = [(64, 5.0), (192, 5.0), *((64 * step, 4.0) for step in range(4, 8))]
    assert values["loss/all"] == expected
    assert values["mixture/web"] == [(64 * step, 64.0) for step in range(1, 8)]
    assert {"speed/mfu", "schedule/lr", "health/grad_norm"} <= set(values)
    assert b"n_layer" in b"".join(
        path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()
    )


def test_tensorboard_that_cannot_write_is_disabled(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "tensorboard").write_text("a file where its folder would be")
    config = MetricsConfig(None, True, 60.0)
    metrics = Metrics(tmp_path, "run", config, {}, throughput(), tokens=0, total=6400)
    metrics.log(record(1), "")
    metrics.close()
    assert (
        "TensorBoard is disabled (" in capsys.readouterr().out
        and len(read_lines(tmp_path / "metrics.jsonl")) == 1
    )


def test_tracker_without_its_package_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_trackers(MetricsConfig(None, True, 60.0))
    monkeypatch.setattr("train.metrics.trackers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install .*\[tensorboard\]"):
        check_trackers(MetricsConfig(None, True, 60.0))
    check_trackers(MetricsConfig("project", False, 60.0))
    with pytest.raises(InputError, match="pip install mlflow"):
        check_trackers(MetricsConfig(None, False, 60.0, ["mlflow"]))
    with pytest.raises(InputError, match="takes aim, clearml"):
        check_trackers(MetricsConfig(None, False, 60.0, ["wandb"]))


AIM = """
import json, os, time
class Run(dict):
    def __init__(self, repo):
        for _ in range(6000):
            if os.path.exists(repo + "/logged"):
                break
            time.sleep(0.1)
        else:
            raise OSError("logging waits for the tracker")
        self.rows, self.repo = [], repo
    def track(self, value, name, step):
        self.rows.append((name, step, value))
    def close(self):
        ranks, devices = "LOCAL_RANK" in os.environ, os.environ["CUDA_VISIBLE_DEVICES"]
        with open(self.repo + "/aim.json", "w") as file:
            json.dump([self.name, dict(self), self.rows, ranks, devices], file)
"""


def test_trackers_of_accelerate_run_in_separate_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fake aim package behind accelerate's own code."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "aim.py").write_text(AIM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("LOCAL_RANK", "0")  # with it, accelerate would join a process group
    monkeypatch.setattr(Accelerated, "CLOSE_SECONDS", TIMEOUT_SECONDS)
    config = MetricsConfig(None, False, 60.0, ["aim"])
    run_config = {"optim": {"lr": 1.0}}
    metrics = Metrics(tmp_path, "run", config, run_config, throughput(), tokens=0, total=6400)
    for step in (1, 2):
        metrics.log(record(step, loss=float("nan") if step == 2 else 5.0), "")
    (tmp_path / "logged").touch()  # the fake package waits for this file
    metrics.log_scores({"step": 1, "tokens": 64, "scores": {"v1": {"ARC": 30.0}}})
    metrics.close()
    name, values, rows, ranks, devices = json.loads((tmp_path / "aim.json").read_text())
    assert (name, values, ranks, devices) == ("run", {"hparams": {"optim/lr": 1.0}}, False, "")
    assert [row for row in rows if row[0] == "loss/all"] == [["loss/all", 64, 5.0]]
    assert ["schedule/lr", 128, 1e-3] in rows and ["scores/v1/ARC", 64, 30.0] in rows


def test_accelerated_names_are_those_of_accelerate() -> None:
    assert {*ACCELERATED} == LOGGER_TYPE_TO_CLASS.keys() - {"wandb", "tensorboard"}


def test_failing_tracker_of_accelerate_is_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "aim.py").write_text("raise OSError('no space')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(Accelerated, "CLOSE_SECONDS", TIMEOUT_SECONDS)
    sink = Accelerated("aim", "run", tmp_path, {})
    sink.log(record(1))
    sink.close()
    assert "aim is disabled (" in capsys.readouterr().out


def test_failing_wandb_is_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(self: Wandb) -> None:
        raise RuntimeError("no space")

    monkeypatch.setattr(Wandb, "_start", fail)
    sink = Wandb(MetricsConfig("project", False, 60.0), "run", tmp_path, {})
    sink.log(record(1))
    sink.close()
    assert "W&B is disabled (RuntimeError: no space)" in capsys.readouterr().out


def test_short_counts_and_flat_keys() -> None:
    assert [short(x) for x in (7, 1799168, 999_900_000, 5.8e12)] == ["7", "1.8M", "1B", "5.8T"]
    assert flatten({"a": {"b": 1}, "c": 2}) == {"a/b": 1, "c": 2}


def test_curves_are_drawn(tmp_path: Path) -> None:
    lines = [
        record(step, stage="a" if step < 5 else "b", loss=6 - step / 10, tokens_per_second=10.0)
        for step in range(1, 10)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = draw(tmp_path).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def record_7b(step: int, **extra: Any) -> dict[str, Any]:
    """A record with numbers as long as those of 7b: 256 ranks, 5.8T tokens, 41 % MFU."""
    figures = {
        "tokens": 5_123_456_789_012,
        "stage": "context-8k-dense",
        "loss": 12.345,
        "lr": 2.56e-4,
        "grad_norm": 123.45,
        "batch": 2048,
        "seq_len": 8192,
        "step_seconds": 15.0,
        "data_wait_seconds": 0.03,
    }
    return record(step, **{**figures, **extra})


def throughput_7b() -> Throughput:
    return Throughput(ranks=256, flops_per_token=9e10, peak_flops=989.5e12)


CHECKPOINTS = "step 1,400,000 saved 12 min ago, saving step 1,420,000"


def test_live_console_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rates = throughput_7b()
    console = LiveConsole(total=5_800_000_000_000, throughput=rates)
    last = record_7b(1_423_456)
    rates.add(last)
    console.show(last, CHECKPOINTS)
    console.close()
    rows = [row.plain for row in console.rows]
    assert rows == [
        "step 1,423,456  loss 12.345  lr 2.6e-04  grad 123.45  skipped 0",
        f"1.12M tok/s  MFU 40%  ends {rows[1].split()[5]}  4.37k tok/s/rank  data wait 0.2%",
        "5.12T of 5.8T tokens  batch 2,048 x 8,192",
        CHECKPOINTS,
    ]
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, rows)) <= 80 and all(row in lines for row in rows)
    task = console.progress.tasks[0]
    assert (task.completed, task.description) == (last["tokens"], "context-8k-dense")


def test_plain_console_lines_fit_and_repeat_the_status(capsys: Any) -> None:
    rates = throughput_7b()
    console = PlainConsole(total=5_800_000_000_000, throughput=rates, seconds=0.0)
    for step in range(1_423_456, 1_423_456 + 24):
        length = 8192 if step < 1_423_458 else 16_384
        last = record_7b(step, seq_len=length, skipped=step == 1_423_459)
        rates.add(last)
        console.show(last, CHECKPOINTS)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= LOG_COLUMNS
    assert lines[0].startswith(
        "context-8k-dense   88.3%  step 1,423,456  loss 12.345  lr 2.6e-04  grad 123.45  "
        "1.12M tok/s  MFU 40%  ends "
    )
    assert lines[1:3] == [
        "  5.12T of 5.8T tokens  batch 2,048 x 8,192  4.37k tok/s/rank  data wait 0.2%  skipped 0",
        f"  {CHECKPOINTS}",
    ]
    # status with the first line, the first of a new context, and every tenth
    steps = [line.split()[3] for line in lines if line.startswith("context")]
    assert len(steps) == 24 and sum("batch" in line for line in lines) == 4
    assert sum("batch 2,048 x 16,384" in line for line in lines) == 3
    assert sum("skipped 1" in line for line in lines) == 2


def test_plain_console_logs_every_few_seconds_and_the_last_step(capsys: Any) -> None:
    rates = throughput()
    console = PlainConsole(total=6400, throughput=rates, seconds=60.0)
    for step in (1, 2, 100):
        rates.add(record(step))
        console.show(record(step), "no checkpoint yet")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines if "step" in line] == ["1", "100"]
    assert lines[1].endswith("  skipped 0  no checkpoint yet") and "MFU" not in lines[0]


def test_throughput_is_the_mean_of_a_window_without_the_first_step() -> None:
    """Batches of 64 tokens; the first step compiles, and one of the last 50 is slow."""
    rates = throughput(peak_flops=100.0)
    rates.add(record(1, step_seconds=600.0))
    assert rates.tokens_per_second == pytest.approx(64 / 600)
    for step in range(2, 40):
        rates.add(record(step, data_wait_seconds=0.64))
    assert rates.tokens_per_second == pytest.approx(10.0)
    assert rates.mfu == pytest.approx(0.1) and rates.data_wait == pytest.approx(0.1)
    for step in range(40, 101):
        rates.add(record(step, step_seconds=64.0 if step == 100 else 6.4))
    assert rates.tokens_per_second == pytest.approx(50 * 64 / (49 * 6.4 + 64.0))


def test_file_and_console_show_the_same_rate(tmp_path: Path, capsys: Any) -> None:
    config = MetricsConfig(None, False, 0.0)
    for peak in (None, 100.0):
        metrics = Metrics(tmp_path, "run", config, {}, throughput(peak), tokens=0, total=6400)
        for step in (1, 2, 3):
            metrics.log(record(step, step_seconds=6.4 if step < 3 else 3.2), "")
        metrics.close()
        last = read_lines(tmp_path / "metrics.jsonl")[-1]
        assert last["tokens_per_second"] == pytest.approx(128 / 9.6) and last["step_seconds"] == 3.2
        assert last.get("mfu") == (None if peak is None else pytest.approx(0.1333, abs=1e-4))
        output = capsys.readouterr().out
        assert "  13.3 tok/s  " in output and ("  MFU 13%  " in output) == (peak is not None)


def test_no_mfu_without_a_peak() -> None:
    """The peak of a CPU comes from the config, that of a GPU from its datasheet in bf16."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    unknown = Cluster(Device.auto, 1, 1, None, 0.0, None)
    assert peak_flops(unknown, Precision.fp32, cpu) is None
    assert peak_flops(replace(unknown, peak_tflops=1.5), Precision.fp32, cpu) == 1.5e12
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.5e12), ("NVIDIA L4", None)):
        with patch("torch.cuda.get_device_name", lambda device, name=name: name):
            assert peak_flops(unknown, Precision.bf16, gpu) == peak
            assert peak_flops(unknown, Precision.fp32, gpu) is None


def test_end_time_has_minutes_only_within_a_week(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)  # 2027-01-15 08:00 UTC
    ends = [end_time(seconds) for seconds in (600, 6 * 86400, 46 * 86400, 1e30)]
    assert ends == ["01-15 08:10Z", "01-21 08:00Z", "2027-03-02", "2058-09-23"]


def test_heldout_losses_are_printed_when_measured(tmp_path: Path, capsys: Any) -> None:
    config = MetricsConfig(None, False, 60.0)
    metrics = Metrics(tmp_path, "run", config, {}, throughput(), tokens=0, total=6400)
    scores = {"web": {"loss": 3.25, "bits_per_byte": 1.5}, "code": {"loss": 2, "bits_per_byte": 1}}
    metrics.log(record(1), "")
    metrics.log(record(2, validation=scores), "")  # within the seconds between two lines
    metrics.close()
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "held-out at step 2, 128 tokens, nats per token (bits per byte):",
        "  web 3.250 (1.500)  code 2.000 (1.000)",
    ]
