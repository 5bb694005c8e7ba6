"""The 7b schedule at hand-computed tokens, and properties of every schedule."""

import math

import pytest
import torch
from transformers import get_wsd_schedule

from tests.compose import run_config
from train.config import DecayShape
from train.schedule import Schedule, decay_factor

GT = 10**9


@pytest.fixture(scope="module")
def falcon() -> Schedule:
    config = run_config("7b")
    return Schedule(config.schedule, config.optim.lr, config.data)


@pytest.mark.parametrize(
    ("tokens", "batch"),
    [
        (0, 128),
        (GT, 166),
        (10 * GT, 512),
        (25 * GT, 1088),
        (50 * GT - 1, 2047),
        (50 * GT, 2048),
        (5000 * GT, 2048),
    ],
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
def test_lr_of_warmup_ramp_and_stable_phase(
    falcon: Schedule, tokens: int, batch: int, lr: float
) -> None:
    assert falcon.lr(tokens, batch) == pytest.approx(lr, rel=1e-12)


def test_lr_of_the_decay(falcon: Schedule) -> None:
    total = falcon.total
    assert falcon.lr(total - 500 * GT, 2048) == pytest.approx(6.4e-4)
    assert falcon.lr(total - 250 * GT, 2048) == pytest.approx(6.4e-4 / 16)  # half way: 256 ** -0.5
    assert falcon.lr(total - 125 * GT, 2048) == pytest.approx(6.4e-4 / 64)  # 256 ** -0.75
    assert falcon.lr(total, 2048) == pytest.approx(2.5e-6)
    assert falcon.at(total - 2048 * 8192).lr == pytest.approx(2.5e-6)  # the last step


@pytest.mark.parametrize(
    ("shape", "quarter", "half", "three_quarters"),
    [
        ("exponential", 1 / 4, 1 / 16, 1 / 64),  # 256 ** -r
        ("linear", 769 / 1024, 257 / 512, 259 / 1024),  # (1 + 255 (1 - r)) / 256
        ("one_minus_sqrt", 257 / 512, (256 - 255 * 0.5**0.5) / 256, (256 - 255 * 0.75**0.5) / 256),
        ("cosine", (257 + 255 * 0.5**0.5) / 512, 257 / 512, (257 - 255 * 0.5**0.5) / 512),
    ],
)
def test_shapes_of_the_decay(
    shape: str, quarter: float, half: float, three_quarters: float
) -> None:
    """Peak until 500 GT before the end, 1/256 of it at the end, and three points by hand."""
    config = run_config("7b", f"schedule.decay_shape={shape}")
    schedule = Schedule(config.schedule, config.optim.lr, config.data)
    for remaining, factor in (
        (600, 1),
        (500, 1),
        (375, quarter),
        (250, half),
        (125, three_quarters),
        (0, 1 / 256),
    ):
        assert schedule.lr(schedule.total - remaining * GT, 2048) == pytest.approx(
            6.4e-4 * factor, rel=1e-12
        ), remaining
    assert schedule.at(schedule.total - 2048 * 8192).lr == pytest.approx(2.5e-6)
    # warmup, ramp and BatchScaling are untouched
    assert schedule.lr(GT, 128) == pytest.approx(1.6e-4)


@pytest.mark.parametrize(
    ("shape", "decay_type"),
    [("linear", "linear"), ("cosine", "cosine"), ("one_minus_sqrt", "1-sqrt")],
)
def test_shapes_are_those_of_transformers(shape: str, decay_type: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_wsd_schedule(
        optimizer,
        num_warmup_steps=0,
        num_decay_steps=40,
        num_stable_steps=0,
        decay_type=decay_type,
        min_lr_ratio=1 / 256,
    )
    for step in range(40):
        assert decay_factor(DecayShape[shape], step / 40, 1 / 256) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-12
        )
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("shape", DecayShape)
def test_every_decay_falls_all_the_way(shape: DecayShape) -> None:
    factors = [decay_factor(shape, r / 100, 1 / 256) for r in range(101)]
    assert factors[0] == 1 and factors[-1] == pytest.approx(1 / 256)
    assert all(later < earlier for earlier, later in zip(factors, factors[1:], strict=False))


def test_noise_temperature_is_constant_over_the_ramp(falcon: Schedule) -> None:
    """BatchScaling: lr / sqrt(batch) = 1.414e-5 from the warmup's end to the decay's start."""
    for tokens in (GT, 3 * GT, 17 * GT, 49 * GT, 400 * GT):
        step = falcon.at(tokens)
        assert step.lr / math.sqrt(step.batch) == pytest.approx(1.4142e-5, rel=1e-4)


def test_context_and_stage_follow_the_tokens(falcon: Schedule) -> None:
    steps = [falcon.at(tokens * GT) for tokens in (0, 2499, 2501, 4000, 5000, 5400)]
    assert [step.seq_len for step in steps] == [2048, 2048, 4096, 8192, 8192, 8192]
    assert [step.stage for step in steps] == [
        "context-2k", "context-2k", "context-4k", "context-8k", "context-8k-dense", "decay",
    ]  # fmt: skip
    assert falcon.at(300 * GT).tokens == 2048 * 2048


def test_steps_tile_every_stage() -> None:
    """Steps sum to the run, never cross a stage's end, and short ones have a full step's rate."""
    config = run_config("demo")
    schedule = Schedule(config.schedule, config.optim.lr, config.data)
    tokens = 0
    short_step_ends = []
    last = None
    while tokens < schedule.total:
        step = schedule.at(tokens)
        assert step.batch >= 1
        if step.batch < schedule.batch(tokens):
            short_step_ends.append(tokens + step.tokens)
        if (
            config.schedule.ramp_tokens
            <= tokens
            < tokens + step.tokens
            <= schedule.total - config.schedule.decay_tokens
        ):
            assert step.lr == pytest.approx(config.optim.lr)
        tokens += step.tokens
        last = step
    assert tokens == schedule.total == config.tokens
    assert set(short_step_ends) <= {end for end, _, _ in schedule.stages}
    assert last is not None and last.lr == pytest.approx(config.schedule.min_lr)


def test_options_that_disable_parts() -> None:
    constant = run_config(
        "7b", "schedule.batch_scaling=false", "schedule.warmup_tokens=0", "schedule.ramp_tokens=0"
    )
    schedule = Schedule(constant.schedule, constant.optim.lr, constant.data)
    assert schedule.batch(0) == 2048
    assert schedule.lr(1, 128) == pytest.approx(6.4e-4)
    no_decay = run_config("demo", "schedule.decay_tokens=0")
    schedule = Schedule(no_decay.schedule, no_decay.optim.lr, no_decay.data)
    assert schedule.lr(no_decay.tokens, 32) == pytest.approx(no_decay.optim.lr)
