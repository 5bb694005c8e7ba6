"""The generation benchmark, on small models."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.baselines import (
    Decoder,
    falcon_mamba,
    hf_falcon_mamba,
    hf_llama,
    llama_config,
)
from benchmarks.generation import (
    Limits,
    Meter,
    bench,
    longest_prompt,
    measure_speed,
    measured_lengths,
    summarize,
)
from benchmarks.interleaved import BLOCK_TOKENS, relative_speeds
from eval.config import EvaluationConfig
from model.flops import parameter_count
from tests.compose import run_config
from tests.tiny import TINY

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable torch.compile, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **named: function)


@pytest.mark.parametrize("make", [falcon_mamba, hf_falcon_mamba, hf_llama])
def test_every_decoder_calls_back_after_each_token(make: Callable[..., Any]) -> None:
    calls = []
    make(TINY, CPU)([12, 13, 14], 7, lambda: calls.append(1))
    assert len(calls) == 7


def test_the_llama_has_about_as_many_parameters() -> None:
    for name in ("7b", "130m", "demo"):
        config = run_config(name).model
        c = llama_config(config)
        layer = 4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
        count = c.num_hidden_layers * layer + 2 * c.vocab_size * c.hidden_size + c.hidden_size
        assert abs(count / parameter_count(config) - 1) < 0.1, name
        assert c.hidden_size % c.num_attention_heads == 0


def test_speed_is_that_of_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that slows down after 256 tokens changes the speeds at 512 and 1,024 only."""
    clock = [0.0]
    meter = Meter(CPU)
    monkeypatch.setattr(meter, "clock", lambda: clock[0])

    def decode(prompt: list[int], count: int, on_token: Callable[[], None]) -> None:
        for index in range(count):
            clock[0] += 0.01 if index < 256 else 0.02
            on_token()

    rows = measure_speed("x", decode, 1024, meter)
    assert [row["tokens"] for row in rows] == measured_lengths(1024) == [256, 512, 1024]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([100, 50, 50])
    assert all(row["total_bytes"] > 10_000_000 for row in rows)


def test_longest_prompt_stops_at_the_memory_limit() -> None:
    def decode(prompt: list[int], count: int, on_token: Callable[[], None]) -> None:
        torch.ones(len(prompt) * 4096).sum()  # 16 KiB a token

    result = longest_prompt("x", decode, 40 << 20, 1 << 20, Meter(CPU))
    assert result["fits"] == 2048 and result["stopped_by"] == "memory"
    unlimited = longest_prompt("x", lambda *a: None, 40 << 20, 1024, Meter(CPU))
    assert unlimited["stopped_by"] == "tokens"


def test_summary() -> None:
    def rows(*values: tuple[int, float, int]) -> dict[str, Any]:
        keys = ("tokens", "tokens_per_second", "total_bytes")
        return {"generated": [dict(zip(keys, value, strict=True)) for value in values]}

    models = {
        "ours": rows((256, 900.0, 80), (1024, 100.0, 100), (2048, 90.0, 101)),
        "other": rows((1024, 20.0, 100)),
    }
    summary = summarize(models)
    assert summary["memory_growth"] == pytest.approx(0.01)
    assert summary["speed_change"] == pytest.approx(-0.1)
    assert summary["speed_spread"] == pytest.approx(100 / 90 - 1)
    assert summary["times faster than other"] == 5.0
    relative = {"ours after 1,024": 1.0, "ours after 2,048": 0.98, "other": 0.125}
    interleaved = summarize(models, relative)
    assert interleaved["speed_change"] == pytest.approx(-0.02)
    assert interleaved["times faster than other"] == 8.0
    assert interleaved["memory_growth"] == pytest.approx(0.01)


def test_interleaved_timing_does_not_depend_on_the_machine_speed() -> None:
    """The simulated machine halves its speed now and then; the ratios stay the same."""
    clock = threading.local()
    factor = [1.0]
    order: list[str] = []

    def decoder(name: str, cost: float) -> Decoder:
        def decode(prompt: list[int], count: int, on_token: Callable[[], None]) -> None:
            for index in range(count):
                token_cost = cost * factor[0] * (1 if index >= 128 else 9)
                clock.now = getattr(clock, "now", 0.0) + token_cost
                order.append(name)
                factor[0] = 2.0 if len(order) // 3000 % 2 else 1.0
                on_token()

        return decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.thread_time", lambda: getattr(clock, "now", 0.0))
        speeds = relative_speeds(
            {"a": (decoder("a", 1.0), 128), "b": (decoder("b", 4.0), 256)}, rounds=30
        )
    assert speeds == {"a": 1.0, "b": pytest.approx(0.25)}
    assert (
        order.count("a") == 128 + 30 * BLOCK_TOKENS and order.count("b") == 256 + 30 * BLOCK_TOKENS
    )

    def broken(prompt: list[int], count: int, on_token: Callable[[], None]) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        relative_speeds({"a": (broken, 128)}, rounds=1)


def test_the_whole_benchmark(
    config: EvaluationConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.generation.ROUNDS", 2)
    bench(config, Limits(512, 512, 512, 0.25))
    result = json.loads((config.run.folder / "bench_generate.json").read_text())
    assert list(result["models"]) == ["ours", "transformers FalconMamba", "transformers Llama"]
    assert (config.run.folder / "bench_generate.png").stat().st_size > 10_000
    assert abs(result["bars"]["memory_growth"]) < 0.02
    speeds = result["relative_speeds"]
    assert list(speeds) == ["ours after 256", "ours after 512", *list(result["models"])[1:]]
    speedup = result["bars"]["times faster than transformers FalconMamba"]
    assert speedup == 1 / speeds["transformers FalconMamba"]
    assert "times faster than transformers FalconMamba" in capsys.readouterr().out
