"""The benchmark of generation: what it counts, on models small enough for a test."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from eval.bench_generate import Meter, bars, bench, longest_prompt, marks, speed
from eval.config import Bench, EvaluationConfig
from eval.rivals import falcon, llama, llama_config, ours
from model.flops import parameter_count
from tests.compose import run_config
from tests.tiny import TINY

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes half a minute: what it compiles runs as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **named: function)


@pytest.mark.parametrize("make", [ours, falcon, llama])
def test_every_model_decodes_as_many_tokens_as_it_is_asked(make: Callable[..., Any]) -> None:
    seen = []
    make(TINY, CPU)([12, 13, 14], 7, lambda: seen.append(1))
    assert len(seen) == 7


def test_the_llama_has_as_many_parameters() -> None:
    for name in ("7b", "130m", "demo"):
        config = run_config(name).model
        c = llama_config(config)
        layer = 4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
        count = c.num_hidden_layers * layer + 2 * c.vocab_size * c.hidden_size + c.hidden_size
        assert abs(count / parameter_count(config) - 1) < 0.1, name
        assert c.hidden_size % c.num_attention_heads == 0


def test_speed_is_that_of_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that slows down after 256 tokens: the first mark does not see it, the next ones do."""
    clock = [0.0]
    meter = Meter(CPU)
    monkeypatch.setattr(meter, "clock", lambda: clock[0])

    def decode(prompt: list[int], count: int, watch: Callable[[], None]) -> None:
        for number in range(count):
            clock[0] += 0.01 if number < 256 else 0.02
            watch()

    rows = speed("x", decode, 1024, meter)
    assert [row["tokens"] for row in rows] == marks(1024) == [256, 512, 1024]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([100, 50, 50])
    assert all(row["total_bytes"] > 10_000_000 for row in rows)


def test_the_longest_prompt_is_found_by_memory() -> None:
    def decode(prompt: list[int], count: int, watch: Callable[[], None]) -> None:
        torch.ones(len(prompt) * 4096).sum()  # 16 KiB a token

    result = longest_prompt("x", decode, 40 << 20, 1 << 20, Meter(CPU))
    assert result["fits"] == 2048 and result["stopped_by"] == "memory"
    assert longest_prompt("x", lambda *a: None, 40 << 20, 1024, Meter(CPU))["stopped_by"] == "tokens"


def test_bars() -> None:
    def rows(*values: tuple[int, float, int]) -> dict[str, Any]:
        keys = ("tokens", "tokens_per_second", "total_bytes")
        return {"generated": [dict(zip(keys, value, strict=True)) for value in values]}

    models = {"ours": rows((256, 900.0, 80), (1024, 100.0, 100), (2048, 90.0, 101)), "other": rows((1024, 20.0, 100))}
    found = bars(models)
    assert found["memory_growth"] == pytest.approx(0.01) and found["speed_change"] == pytest.approx(-0.1)
    assert found["speed_spread"] == pytest.approx(100 / 90 - 1) and found["times faster than other"] == 5.0


def test_the_whole_benchmark(config: EvaluationConfig, capsys: pytest.CaptureFixture[str]) -> None:
    bench(replace(config, eval=replace(config.eval, bench=Bench(512, 512, 512, 0.25))))
    result = json.loads((config.run.folder / "bench_generate.json").read_text())
    assert list(result["models"]) == ["ours", "transformers FalconMamba", "transformers Llama"]
    assert (config.run.folder / "bench_generate.png").stat().st_size > 10_000
    assert abs(result["bars"]["memory_growth"]) < 0.02
    assert "times faster than transformers FalconMamba" in capsys.readouterr().out
