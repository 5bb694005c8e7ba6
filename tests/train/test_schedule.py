"""The 7b schedule at hand-computed tokens, and the properties every schedule must have."""

import math

import pytest

from tests.compose import run_config
from train.schedule import Schedule

GT = 10**9


@pytest.fixture(scope="module")
def falcon() -> Schedule:
    config = run_config("7b")
    return Schedule(config.schedule, config.data)


@pytest.mark.parametrize(
    ("tokens", "batch"),
    [(0, 128), (GT, 166), (10 * GT, 512), (25 * GT, 1088), (50 * GT - 1, 2047), (50 * GT, 2048), (5000 * GT, 2048)],
)
def test_batch_ramp(falcon: Schedule, tokens: int, batch: int) -> None:
    assert falcon.batch(tokens) == batch  # 128 + 1920 * tokens / 50 GT


@pytest.mark.parametrize(
    ("tokens", "batch", "lr"),
    [
        (GT, 128, 1.6e-4),  # 6.4e-4 * sqrt(128 / 2048)
        (GT // 2, 128, 0.8e-4),  # half way through the warmup
        (10 * GT, 512, 3.2e-4),  # 6.4e-4 * sqrt(512 / 2048)
        (50 * GT, 2048, 6.4e-4),
        (5000 * GT, 2048, 6.4e-4),
        (5299 * GT, 2048, 6.4e-4),
    ],
)
def test_lr_of_warmup_ramp_and_stable_phase(falcon: Schedule, tokens: int, batch: int, lr: float) -> None:
    assert falcon.lr(tokens, batch) == pytest.approx(lr, rel=1e-12)


def test_lr_of_the_decay(falcon: Schedule) -> None:
    total = falcon.total
    assert falcon.lr(total - 500 * GT, 2048) == pytest.approx(6.4e-4)
    assert falcon.lr(total - 250 * GT, 2048) == pytest.approx(6.4e-4 / 16)  # half way: 256 ** -0.5
    assert falcon.lr(total - 125 * GT, 2048) == pytest.approx(6.4e-4 / 64)  # 256 ** -0.75
    assert falcon.lr(total, 2048) == pytest.approx(2.5e-6)
    assert falcon.at(total - 2048 * 8192).lr == pytest.approx(2.5e-6)  # the last step


def test_noise_temperature_is_constant_over_the_ramp(falcon: Schedule) -> None:
    """BatchScaling: lr / sqrt(batch) = 1.414e-5 from the end of the warmup to the end of the stable phase."""
    for tokens in (GT, 3 * GT, 17 * GT, 49 * GT, 400 * GT):
        now = falcon.at(tokens)
        assert now.lr / math.sqrt(now.batch) == pytest.approx(1.4142e-5, rel=1e-4)


def test_context_and_stage_follow_the_tokens(falcon: Schedule) -> None:
    seen = [falcon.at(tokens * GT) for tokens in (0, 2499, 2501, 4000, 5000, 5400)]
    assert [now.seq_len for now in seen] == [2048, 2048, 4096, 8192, 8192, 8192]
    assert [now.stage for now in seen] == [
        "context-2k", "context-2k", "context-4k", "context-8k", "context-8k-dense", "decay",
    ]  # fmt: skip
    assert falcon.at(300 * GT).tokens == 2048 * 2048


def test_steps_tile_every_stage() -> None:
    """Steps add up to the run exactly, never cross an edge, and a short step has the rate of a full one."""
    config = run_config("demo")
    schedule = Schedule(config.schedule, config.data)
    tokens, short, last = 0, [], None
    while tokens < schedule.total:
        now = schedule.at(tokens)
        assert now.batch >= 1
        if now.batch < schedule.batch(tokens):
            short.append(tokens + now.tokens)
        if config.schedule.ramp_tokens <= tokens < tokens + now.tokens <= schedule.total - config.schedule.decay_tokens:
            assert now.lr == pytest.approx(config.schedule.peak_lr)
        tokens += now.tokens
        last = now
    assert tokens == schedule.total == config.tokens
    assert set(short) <= {end for end, _, _ in schedule.edges}
    assert last is not None and last.lr == pytest.approx(config.schedule.min_lr)


def test_switches() -> None:
    plain = run_config("7b", "schedule.batch_scaling=false", "schedule.warmup_tokens=0", "schedule.ramp_tokens=0")
    schedule = Schedule(plain.schedule, plain.data)
    assert schedule.batch(0) == 2048
    assert schedule.lr(1, 128) == pytest.approx(6.4e-4)
    none = run_config("demo", "schedule.decay_tokens=0")
    assert Schedule(none.schedule, none.data).lr(none.tokens, 32) == pytest.approx(none.schedule.peak_lr)
