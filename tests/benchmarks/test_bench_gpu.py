"""The GPU benchmark lists what is missing, wrong or failing, and measures the rest."""

import json
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import gpu, gpu_model, gpu_operations, timing
from benchmarks.gpu_bench import MAX_COPIES, ROTATION_BYTES, Bench, assert_close
from model.kernels import CPU, REFERENCE
from model.kernels.interface import Kernels
from tests.compose import run_config


@pytest.fixture
def bench() -> Bench:
    return Bench(torch.device("cpu"), run_config("demo", *gpu.SMALL), 16, [1], 0.0, 1)


def wrong_scan(*arguments: Any, **named: Any) -> Any:
    y, state = REFERENCE.selective_scan(*arguments, **named)
    return y * 1.01, state


def failing_scan(*arguments: Any, **named: Any) -> Any:
    raise RuntimeError("an illegal memory access was encountered\nand so on")


def with_scan(name: str, scan: Any) -> Kernels:
    return replace(REFERENCE, name=name, selective_scan=scan)


def test_a_wrong_or_failing_backend_is_listed_and_not_timed(bench: Bench) -> None:
    bench.backends = {
        "wrong": with_scan("wrong", wrong_scan),
        "failing": with_scan("failing", failing_scan),
        "cpu": CPU,
    }
    gpu_operations.check(bench)
    gpu_operations.scans(bench)
    assert {row.who for row in bench.rows} == {"cpu"}
    assert bench.missing["wrong: all, wrong or failing"].startswith(
        "AssertionError: ('wrong', 'scan_results'"
    )
    reason = "RuntimeError: an illegal memory access was encountered"
    assert bench.missing["failing: all, wrong or failing"] == reason


def test_a_backend_that_fails_at_full_size_does_not_stop_others(bench: Bench) -> None:
    bench.backends = {"failing": with_scan("failing", failing_scan), "cpu": CPU}
    gpu_operations.scans(bench)
    assert [row.who for row in bench.rows] == ["cpu", "cpu"]
    assert "failing: scan, B 1, L 16" in bench.missing


def test_a_failing_section_does_not_stop_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_operations, "norms", failing_scan)
    monkeypatch.setattr(gpu_model, "layers", lambda bench: None)
    monkeypatch.setattr(
        gpu_model, "rank", lambda bench, layers: bench.missing.update(last=str(layers))
    )
    bench.backends = {"cpu": CPU}
    gpu.measure(bench, Namespace(small=True, layers=3, jax_python=None, sections=gpu.SECTIONS))
    assert bench.missing["all: norms"].startswith("RuntimeError") and bench.missing["last"] == "2"
    assert {"jax-linear-attention", "Liger Kernel: head and loss"} <= set(bench.missing)
    assert any(row.what.startswith("head and loss") for row in bench.rows)


def test_results_are_written_after_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without git the commit is null."""

    def measure(bench: Bench, *rest: Any) -> None:
        gpu_operations.ceilings(bench, 64, 2**16)
        bench.missing["a baseline"] = "not installed"
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--small"])
    monkeypatch.setenv("PATH", "")
    with suppress(KeyboardInterrupt):
        gpu.main()
    (path,) = tmp_path.glob("gpu-cpu*.json")
    record = json.loads(path.read_text())
    assert record["commit"] is None and record["missing"]["a baseline"] == "not installed"
    assert [row["what"] for row in record["rows"]] == ["matrix product, bf16", "copy"]


def test_jax_scan_runs_in_another_process(bench: Bench, tmp_path: Path) -> None:
    """Finished batch sizes are kept when the next one fails; a missing interpreter is listed."""
    python = tmp_path / "python"
    row = json.dumps({"batch": 1, "runs": 30, "forward": 1.0, "both": 3.0})
    python.write_text(f"#!/bin/sh\necho '{row}'\necho wrong: result 2 is off >&2\nexit 1\n")
    python.chmod(0o755)
    gpu_operations.jax_scans(bench, str(python))
    assert [row.seconds for row in bench.rows] == [1.0, 3.0]
    assert bench.missing.pop("jax-linear-attention: scan").endswith("wrong: result 2 is off")
    gpu_operations.jax_scans(bench, str(tmp_path / "none"))
    assert bench.missing["jax-linear-attention: scan"].startswith("FileNotFoundError")


def test_layers_that_do_not_fit_are_halved(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def time_rank(bench: Bench, name: str, kernels: Kernels, layers: int) -> None:
        tried.append(layers)
        if layers > 2:
            raise torch.cuda.OutOfMemoryError
        raise ValueError("something else")

    monkeypatch.setattr(gpu_model, "_time_rank", time_rank)
    bench.backends = {"cpu": CPU}
    gpu_model.rank(bench, 8)
    assert tried == [8, 4, 2]
    assert bench.missing["cpu: a rank's step of 2 layers"] == "ValueError: something else"


def test_a_wrong_layer_of_transformers_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = gpu_model.hf_falcon_mamba_layer(bench)
    width = bench.config.d_model
    assert layer(torch.randn(1, 3, width), None).shape == (1, 3, width)
    to_hf = gpu_model.to_hf
    monkeypatch.setattr(
        gpu_model, "to_hf", lambda name, x: to_hf(name, x) * (1.1 if name.endswith("D") else 1.0)
    )
    with pytest.raises(AssertionError, match="wrong: result"):
        gpu_model.hf_falcon_mamba_layer(bench)


def test_assert_close() -> None:
    x = torch.ones(4, requires_grad=True)
    assert_close([x], [x * 1.001], 1e-2)
    with pytest.raises(AssertionError, match="result 1 is off by"):
        assert_close([x, x], [x, x * 1.1], 1e-2)
    with pytest.raises(AssertionError):
        assert_close([x * float("nan")], [x], 1e-2)


def test_small_inputs_rotate_through_many_copies(bench: Bench) -> None:
    made = []

    def make(seed: int) -> list[torch.Tensor]:
        made.append(seed)
        return [torch.empty(ROTATION_BYTES // 20, dtype=torch.uint8)]

    next_inputs = bench.rotation(make)
    assert len(made) == 21 <= MAX_COPIES
    assert len({id(next_inputs()[0]) for _ in range(50)}) == 21


def test_a_gpu_run_has_several_calls_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA events are replaced by a clock on which a call takes 2 ms."""
    calls: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.recorded = 0

        def record(self) -> None:
            self.recorded = len(calls)

        def elapsed_time(self, end: "Event") -> float:
            return 2.0 * (end.recorded - self.recorded)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    synchronize = mock.Mock()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    seconds, runs = timing.median_seconds(
        lambda: calls.append(0), torch.device("cuda"), budget=0.1, min_runs=3
    )
    assert seconds == pytest.approx(2e-3) and synchronize.call_count == runs + 1
    assert len(calls) == 2 + runs * timing.CALLS
