"""The benchmark of generation: what it counts, on models small enough for a test."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.baselines import Decoder, falcon, llama, llama_config, ours
from benchmarks.generation import Extent, Meter, bars, bench, longest_prompt, marks, speed
from benchmarks.interleaved import BLOCK, relative_speeds
from eval.config import EvaluationConfig
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
    """A decoder that slows down after 256 tokens: the first mark does not see it, the next ones
    do.
    """
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
    assert (
        longest_prompt("x", lambda *a: None, 40 << 20, 1024, Meter(CPU))["stopped_by"] == "tokens"
    )


def test_bars() -> None:
    def rows(*values: tuple[int, float, int]) -> dict[str, Any]:
        keys = ("tokens", "tokens_per_second", "total_bytes")
        return {"generated": [dict(zip(keys, value, strict=True)) for value in values]}

    models = {
        "ours": rows((256, 900.0, 80), (1024, 100.0, 100), (2048, 90.0, 101)),
        "other": rows((1024, 20.0, 100)),
    }
    found = bars(models)
    assert found["memory_growth"] == pytest.approx(0.01) and found["speed_change"] == pytest.approx(
        -0.1
    )
    assert (
        found["speed_spread"] == pytest.approx(100 / 90 - 1)
        and found["times faster than other"] == 5.0
    )
    in_turns = bars(models, {"ours after 1,024": 1.0, "ours after 2,048": 0.98, "other": 0.125})
    assert (
        in_turns["speed_change"] == pytest.approx(-0.02)
        and in_turns["times faster than other"] == 8.0
    )
    assert in_turns["memory_growth"] == pytest.approx(0.01)


def test_turns_compare_decoders_on_a_machine_that_changes_its_speed() -> None:
    """Work in blocks that neighbour in time, on a machine that halves its speed now and then:
    ratios do not see it.
    """
    clock, factor = threading.local(), [1.0]
    order: list[str] = []

    def decoder(name: str, cost: float) -> Decoder:
        def decode(prompt: list[int], count: int, watch: Callable[[], None]) -> None:
            for number in range(count):
                clock.now = getattr(clock, "now", 0.0) + cost * factor[0] * (
                    1 if number >= 128 else 9
                )
                order.append(name)
                factor[0] = 2.0 if len(order) // 3000 % 2 else 1.0
                watch()

        return decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.thread_time", lambda: getattr(clock, "now", 0.0))
        found = relative_speeds(
            {"a": (decoder("a", 1.0), 128), "b": (decoder("b", 4.0), 256)}, rounds=30
        )
    assert found == {"a": 1.0, "b": pytest.approx(0.25)}
    assert order.count("a") == 128 + 30 * BLOCK and order.count("b") == 256 + 30 * BLOCK

    def broken(prompt: list[int], count: int, watch: Callable[[], None]) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        relative_speeds({"a": (broken, 128)}, rounds=1)


def test_the_whole_benchmark(
    config: EvaluationConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.generation.ROUNDS", 2)
    bench(config, Extent(512, 512, 512, 0.25))
    result = json.loads((config.run.folder / "bench_generate.json").read_text())
    assert list(result["models"]) == ["ours", "transformers FalconMamba", "transformers Llama"]
    assert (config.run.folder / "bench_generate.png").stat().st_size > 10_000
    assert abs(result["bars"]["memory_growth"]) < 0.02
    speeds = result["relative_speeds"]
    assert list(speeds) == ["ours after 256", "ours after 512", *list(result["models"])[1:]]
    assert (
        result["bars"]["times faster than transformers FalconMamba"]
        == 1 / speeds["transformers FalconMamba"]
    )
    assert "times faster than transformers FalconMamba" in capsys.readouterr().out
