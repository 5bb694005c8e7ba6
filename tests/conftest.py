"""What all tests share, and the table of faults that `make faults` prints."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from core import log

# a busy machine fails no test: neither an example that takes long nor the drawing of examples
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)
log.init_logger()


# What gates a change and is too long for `make test`: files, or single tests of a file. `make
# test-all` runs it too.
GATES = (
    "tests/benchmarks",
    "tests/docs/test_pages.py::test_own_text_is_built_and_looked_at",
    "tests/eval/test_clients.py",
    "tests/eval/test_suite.py",
    "tests/launch/test_dryrun.py::test_a_step_at_full_width",
    "tests/launch/test_slurm.py",
    "tests/data/test_passes.py",
    "tests/examples",
    "tests/model/test_cuda.py",
    "tests/test_soak.py",
    "tests/train/test_costs.py",
    "tests/train/test_faults.py::test_a_spike_that_lasts_is_rewound_and_left_out",
    "tests/train/test_faults.py::test_bad_shards_are_named",
    "tests/train/test_faults.py::test_other_zero_stages_under_faults",
    "tests/train/test_matrix.py",
    "tests/train/test_torchrun.py",
    "tests/train/test_traffic.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", action="store_true", help="the tests of faults alone, the slow ones too"
    )
    parser.addoption(
        "--slow", action="store_true", help="the slow tests too, as `make matrix` does"
    )


@pytest.hookimpl(tryfirst=True)  # before -m chooses by what is marked here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, slow = config.getoption("--faults"), config.getoption("--slow")
    kept = [
        item
        for item in items
        if (
            item.get_closest_marker("fault")
            if chosen
            else slow or not item.get_closest_marker("slow")
        )
    ]
    dropped = [item for item in items if item not in kept]
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    for item in items:
        if item.nodeid.startswith(GATES):
            item.add_marker("gate")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes the figure that a test of a fault has measured."""
    return lambda text: request.node.user_properties.append(("measured", text))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    outcome = yield
    marker = item.get_closest_marker("fault")
    if marker is not None:
        outcome.get_result().fault = marker.args


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A line for each fault: what is promised, whether it held, what was measured."""
    if not config.getoption("--faults"):
        return
    terminalreporter.section("faults")
    for report in sorted(
        (
            report
            for kind in ("passed", "failed", "error", "skipped")
            for report in terminalreporter.stats.get(kind, [])
        ),
        key=lambda report: (getattr(report, "fault", ("", ""))[0], report.nodeid),
    ):
        if hasattr(report, "fault") and (report.when == "call" or report.outcome != "passed"):
            figures = "; ".join(text for key, text in report.user_properties if key == "measured")
            name, promise = report.fault
            file, test = report.nodeid.removeprefix("tests/train/").split("::")
            terminalreporter.write_line(
                f"{report.outcome:>7} | {name} | {promise} | {file}: {test} | {figures} | "
                f"{report.duration:.1f} s"
            )
