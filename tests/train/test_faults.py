"""A run under faults ends as a clean one: real processes, killed, stopped, cut off, and started again."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.corpus import make_corpus
from tests.injector import Fault
from tests.small import config, health
from tests.soak import Result, soak
from train.config import RunConfig

SHORT = [
    Fault("kill", 1, 6), Fault("kill in save", 0, 9, 4), Fault("checkpoint damaged", 0, 16, 8), Fault("stop", 1, 21),
    Fault("nan", 0, 24, 1), Fault("disk full", 1, 26), Fault("SIGTERM", 1, 31), Fault("weights flip", 1, 36),
]  # fmt: skip


def quick(root: Path) -> RunConfig:
    """The small run, with a watchdog as impatient as it can be on a busy machine."""
    run = config(root, "soak")
    run.health = replace(health(), hang_seconds=8.0, max_starts=20, spike_window=8)
    return run


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Result:
    home = tmp_path_factory.mktemp("soak")
    make_corpus(home / "data")
    run = quick(home)
    return soak(run, SHORT, home)


def test_a_short_soak_ends_bit_for_bit_as_a_clean_run(short: Result) -> None:
    assert short.differences == []
    assert {fault.name for fault in short.faults} == short.fired
    harmless = {"nan", "disk full"}
    assert short.history.starts == 1 + len({fault.kind for fault in SHORT} - harmless)


def test_exit_codes_say_what_happened(short: Result) -> None:
    codes = short.history.codes
    assert codes[-1] == [0, 0]
    assert [75, 75] in codes  # asked to leave by one rank's SIGTERM, three times over
    assert sum(-9 in start for start in codes) >= 4
    assert any(76 in start for start in codes)  # the peer of the stopped rank


def test_no_secret_of_the_environment_is_written(short: Result) -> None:
    assert short.secrets == []
