"""What a run does about losses that are not finite, spikes and slow ranks, restarted or not."""

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.mamba import FalconMamba
from tests.corpus import make_corpus
from tests.small import config
from tests.small import health as settings
from train.resilience.failure_policy import FailurePolicy
from train.resilience.health import SpikeDetector, StragglerDetector
from train.resilience.incidents import read_outcome
from train.resilience.replicas import bit_sum
from train.run_context import start

CONFIG = replace(
    settings(),
    spike_window_updates=16,
    spike_patience_updates=3,
    max_skipped_updates=6,
    max_rollbacks=2,
)


def normal(seed: int, count: int) -> list[float]:
    chance = random.Random(seed)
    return [3.0 + chance.gauss(0, 0.05) for _ in range(count)]


def step(detector: SpikeDetector, loss: float, tokens: int, stage: str = "a") -> bool:
    """One step; whether it was skipped."""
    why = detector.check(loss, stage)
    detector.update(loss, tokens, why is None, why is not None and "spike" in why)
    return why is not None


@pytest.mark.fault("a loss that is not finite", "that one update is skipped, and no later one")
def test_one_bad_loss_skips_one_update(measured: Any) -> None:
    """OLMo-core 2.x lets the value into its window and skips the next 128 too."""
    detector = SpikeDetector(CONFIG)
    losses = normal(0, 30) + [float("nan")] + normal(1, 20) + [float("inf")] + normal(2, 200)
    skipped = [number for number, loss in enumerate(losses) if step(detector, loss, number)]
    assert skipped == [30, 51]
    measured("2 of 2 skipped, 0 of 250 others")


@pytest.mark.fault("a loss spike", "that one update is skipped")
def test_one_spike_skips_one_update(measured: Any) -> None:
    detector = SpikeDetector(CONFIG)
    losses = [*normal(0, 40), 4.0, *normal(1, 1000)]
    assert [number for number, loss in enumerate(losses) if step(detector, loss, number)] == [40]
    assert not detector.should_roll_back and detector.spikes == 0
    measured("1 of 1 skipped, 0 of 1,000 others")


def test_a_spike_that_lasts_calls_for_a_rewind_and_too_many_for_a_stop() -> None:
    detector = SpikeDetector(CONFIG)
    for number, loss in enumerate(normal(0, 20)):
        step(detector, loss, number)
    for number in range(20, 23):
        assert not detector.should_roll_back
        assert step(detector, 9.0, number)
    assert detector.should_roll_back and detector.since == 20 and detector.should_abort is None
    detector.rollbacks = CONFIG.max_rollbacks
    assert "spiked again" in str(detector.should_abort)


def test_rewinds_are_forgiven_after_a_whole_window_of_updates() -> None:
    detector = SpikeDetector(CONFIG)
    detector.rollbacks, detector.updates_since_rollback = 1, 0
    for number, loss in enumerate(normal(0, CONFIG.spike_window_updates)):
        assert detector.rollbacks == 1
        step(detector, loss, number)
    assert detector.rollbacks == 0


def test_too_many_skipped_updates_stop_the_run() -> None:
    detector = SpikeDetector(CONFIG)
    for number in range(CONFIG.max_skipped_updates):
        step(detector, float("nan"), number)
        assert detector.should_abort is None
    step(detector, float("nan"), 99)
    assert "7 updates in a row" in str(detector.should_abort)


def test_another_mixture_is_no_spike() -> None:
    detector = SpikeDetector(CONFIG)
    for number, loss in enumerate(normal(0, 40)):
        step(detector, loss, number, "a")
    assert not any(
        step(detector, loss + 2.0, number, "b") for number, loss in enumerate(normal(1, 40))
    )


@given(st.integers(0, 10_000), st.integers(0, 119), st.sets(st.integers(0, 119), max_size=12))
def test_a_restart_anywhere_changes_no_decision(seed: int, cut: int, bad: set[int]) -> None:
    chance = random.Random(seed)
    values = [float("nan"), float("inf"), 3.5, 4.0, 50.0]
    losses = [
        chance.choice(values) if number in bad else loss
        for number, loss in enumerate(normal(seed, 120))
    ]
    whole, first = SpikeDetector(CONFIG), SpikeDetector(CONFIG)
    expected = [step(whole, loss, number) for number, loss in enumerate(losses)]
    decisions = [step(first, loss, number) for number, loss in enumerate(losses[:cut])]
    second = SpikeDetector(CONFIG)
    second.load(json.loads(json.dumps(first.state())))
    decisions += [step(second, loss, number) for number, loss in enumerate(losses[cut:], cut)]
    assert decisions == expected and second.state() == whole.state()


@pytest.mark.fault("a slow rank", "named, with its host, while the run goes on")
def test_a_straggler_is_named_and_nobody_else(measured: Any) -> None:
    chance = random.Random(0)
    noise = [[0.1 * chance.lognormvariate(0, 0.15) for _ in range(8)] for _ in range(1000)]
    fair, slow = (StragglerDetector(8, 1.5, one_machine=False) for _ in range(2))
    assert all(fair.add(row) == [] for row in noise)
    named = named_by(slow, [[*row[:5], row[5] + 0.08, *row[6:]] for row in noise])
    first, _ = named[0]
    assert first <= 20 and {rank for _, rank in named} == {5}
    assert [step for step, _ in named] == [first * 2**i for i in range(len(named))]
    measured(f"named after {first} steps; 0 false alarms in 1,000")


def named_by(stragglers: StragglerDetector, seconds: list[list[float]]) -> list[tuple[int, int]]:
    """Step and rank of each alarm, from every rank's seconds of each step."""
    return [(step, rank) for step, row in enumerate(seconds, 1) for rank, _ in stragglers.add(row)]


def busy_machine(seed: int, num_steps: int) -> list[list[float]]:
    """Seconds of two ranks on two cores that other processes use too: for some dozen steps they
    double most steps of one rank or the other.
    """
    chance = random.Random(seed)
    rows, disturbed = [], [False, False]
    for _ in range(num_steps):
        disturbed = [chance.random() < (0.95 if state else 0.02) for state in disturbed]
        rows.append(
            [
                0.1
                * chance.lognormvariate(0, 0.15)
                * (2.0 if state and chance.random() < 0.8 else 1.0)
                for state in disturbed
            ]
        )
    return rows


@pytest.mark.fault("ranks that share a busy machine", "none is named unless it stays slow")
def test_noise_on_one_machine_is_no_straggler_and_a_slow_rank_is(measured: Any) -> None:
    false = 0
    by_median = 0
    delays = []
    for seed in range(20):
        noise = busy_machine(seed, 1000)
        false += len(named_by(StragglerDetector(8, 1.5, one_machine=True), noise))
        by_median += len(named_by(StragglerDetector(8, 1.5, one_machine=False), noise))
        slow = [[first, 2.5 * second] for first, second in noise]
        named = named_by(StragglerDetector(8, 1.5, one_machine=True), slow)
        assert {rank for _, rank in named} == {1}
        delays.append(named[0][0])
    assert false == 0 and by_median > 20
    measured(f"0 false alarms in 20,000 steps, named after {statistics.median(delays):.0f} steps")


def test_every_bit_of_a_weight_counts() -> None:
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = bit_sum(weight)
    for bit in range(32):
        flipped = weight.clone()
        flipped.view(torch.int32)[bit * 31] ^= torch.tensor(1 << bit).to(torch.int32)
        assert bit_sum(flipped) != whole


@pytest.mark.parametrize(
    ("finite", "fault", "reason"),
    [
        (0, "loss", "all updates were skipped in "),
        (0, "gradient", "all updates were skipped in "),
        (10, "loss", "33 of 43 updates were skipped in "),
        (30, "gradient", "the last 13 updates were skipped in "),
        (42, "loss", "finished: 3,328 tokens in 43 steps, 1 without an update"),
    ],
)
@pytest.mark.fault("all, most or the last updates are skipped until the run's end", "exit 2")
def test_a_run_whose_updates_were_skipped_has_not_finished(
    finite: int,
    fault: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: Any,
) -> None:
    """The forward passes after the first `finite` steps give NaN in their losses or gradients."""
    make_corpus(tmp_path / "data")
    run = config(tmp_path, "run")
    run.health = replace(settings(), max_skipped_updates=1000)
    forward, policy_update = FalconMamba.forward, FailurePolicy.update
    steps = 0

    def counted_update(policy: FailurePolicy, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return policy_update(policy, *arguments)

    def broken_forward(model: FalconMamba, *arguments: Any) -> Any:
        losses, log_sums = forward(model, *arguments)
        if steps >= finite and torch.is_grad_enabled():
            if fault == "loss":
                losses = losses * float("nan")
            else:
                losses.register_hook(lambda gradient: gradient * float("nan"))
        return losses, log_sums

    monkeypatch.setattr(FailurePolicy, "update", counted_update)
    monkeypatch.setattr(FalconMamba, "forward", broken_forward)
    outcome = start(run, "cpu")
    assert outcome.reason.startswith(reason)
    assert outcome.code == (0 if reason.startswith("finished") else 2)
    assert read_outcome(run.run.folder) == outcome
    assert start(run, "cpu") == outcome  # the complete run, started again
    measured(outcome.reason.split(":")[0])
