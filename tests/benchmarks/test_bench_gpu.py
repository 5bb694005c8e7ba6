"""What the GPU benchmark does when something is missing, wrong or failing: it costs that row, and
is named.
"""

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
from benchmarks.gpu_bench import COPIES, L2_BYTES, Bench, agree
from model.kernels import CPU, REFERENCE
from model.kernels.interface import Kernels
from tests.compose import run_config


@pytest.fixture
def bench() -> Bench:
    return Bench(torch.device("cpu"), run_config("demo", *gpu.SMALL), 16, [1], 0.0, 1)


def wrong_scan(*arguments: Any, **named: Any) -> Any:
    y, last = REFERENCE.selective_scan(*arguments, **named)
    return y * 1.01, last


def failing_scan(*arguments: Any, **named: Any) -> Any:
    raise RuntimeError("an illegal memory access was encountered\nand so on")


def with_scan(name: str, scan: Any) -> Kernels:
    return replace(REFERENCE, name=name, selective_scan=scan)


def test_a_backend_that_is_wrong_or_fails_is_named_and_not_timed(bench: Bench) -> None:
    bench.backends = {
        "wrong": with_scan("wrong", wrong_scan),
        "failing": with_scan("failing", failing_scan),
    } | {"cpu": CPU}
    gpu_operations.check(bench)
    gpu_operations.scans(bench)
    assert {row.who for row in bench.rows} == {"cpu"}
    assert bench.missing["wrong: all, wrong or failing"].startswith(
        "AssertionError: ('wrong', 'scan_results'"
    )
    failed = "RuntimeError: an illegal memory access was encountered"
    assert bench.missing["failing: all, wrong or failing"] == failed


def test_a_backend_that_fails_at_full_size_costs_its_own_rows(bench: Bench) -> None:
    bench.backends = {"failing": with_scan("failing", failing_scan), "cpu": CPU}
    gpu_operations.scans(bench)
    assert [row.who for row in bench.rows] == [
        "cpu",
        "cpu",
    ] and "failing: scan, B 1, L 16" in bench.missing


def test_a_section_that_fails_is_named_and_the_others_go_on(
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


def test_what_was_measured_is_written_when_somebody_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without git."""

    def measure(bench: Bench, *rest: Any) -> None:
        gpu_operations.ceilings(bench, 64, 2**16)
        bench.missing["a rival"] = "not here"
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--small"])
    monkeypatch.setenv("PATH", "")
    with suppress(KeyboardInterrupt):
        gpu.main()
    (path,) = tmp_path.glob("gpu-cpu*.json")
    record = json.loads(path.read_text())
    assert record["commit"] is None and record["missing"]["a rival"] == "not here"
    assert [row["what"] for row in record["rows"]] == ["matrix product, bf16", "copy"]


def test_jax_in_its_own_process(bench: Bench, tmp_path: Path) -> None:
    """Rows of batches that it has done stay when the next one fails; no interpreter at all is named
    too.
    """
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

    def step(bench: Bench, name: str, kernels: Kernels, layers: int) -> None:
        tried.append(layers)
        if layers > 2:
            raise torch.cuda.OutOfMemoryError
        raise ValueError("something else")

    monkeypatch.setattr(gpu_model, "_rank", step)
    bench.backends = {"cpu": CPU}
    gpu_model.rank(bench, 8)
    assert (
        tried == [8, 4, 2]
        and bench.missing["cpu: a rank's step of 2 layers"] == "ValueError: something else"
    )


def test_a_layer_of_transformers_that_is_another_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = gpu_model.falcon_layer(bench)
    assert layer(torch.randn(1, 3, bench.config.d_model), None).shape == (
        1,
        3,
        bench.config.d_model,
    )
    to_hf = gpu_model.to_hf
    monkeypatch.setattr(
        gpu_model, "to_hf", lambda name, x: to_hf(name, x) * (1.1 if name.endswith("D") else 1.0)
    )
    with pytest.raises(AssertionError, match="wrong: result"):
        gpu_model.falcon_layer(bench)


def test_results_agree_or_not() -> None:
    x = torch.ones(4, requires_grad=True)
    agree([x], [x * 1.001], 1e-2)
    with pytest.raises(AssertionError, match="result 1 is off by"):
        agree([x, x], [x, x * 1.1], 1e-2)
    with pytest.raises(AssertionError):
        agree([x * float("nan")], [x], 1e-2)


def test_inputs_rotate_past_the_cache(bench: Bench) -> None:
    """Small ones by many copies."""
    made = []

    def make(seed: int) -> list[torch.Tensor]:
        made.append(seed)
        return [torch.empty(L2_BYTES // 20, dtype=torch.uint8)]

    turn = bench.rotation(make)
    assert len(made) == 21 <= COPIES and len({id(turn()[0]) for _ in range(50)}) == 21


def test_a_gpu_is_given_several_calls_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's clock on which a call takes 2 ms."""
    calls: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            self.at = len(calls)

        def elapsed_time(self, end: "Event") -> float:
            return 2.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    synchronize = mock.Mock()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    seconds, runs = timing.median_seconds(
        lambda: calls.append(0), torch.device("cuda"), budget=0.1, least=3
    )
    assert seconds == pytest.approx(2e-3) and synchronize.call_count == runs + 1
    assert len(calls) == 2 + runs * timing.CALLS
