"""Settings and fixtures of all tests, and the table of faults that `make faults` prints."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from core import log

# no test fails on a busy machine: no deadline for an example, none for drawing examples
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)
log.init_logger()
# tests send these to processes that they start, which inherit what nohup or a shell's & ignores
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files and tests that gate a change but take too long for `make test`; `make test-all` runs them.
GATES = (
    "tests/benchmarks",
    "tests/docs/test_pages.py::test_own_text_is_built_and_looked_at",
    "tests/eval/test_clients.py",
    "tests/eval/test_suite.py",
    "tests/launch/test_dryrun.py::test_a_step_at_full_width",
    "tests/launch/test_slurm.py",
    "tests/data/test_falcon.py::test_7b_prepares_real_text_with_the_real_vocabulary",
    "tests/data/test_passes.py",
    "tests/examples",
    "tests/model/test_cuda.py",
    "tests/test_own_text.py",
    "tests/test_soak.py",
    "tests/test_writes.py::test_prepare_save_and_export_sync_before_they_rename",
    "tests/train/test_costs.py",
    "tests/train/test_faults.py::test_persistent_spike_is_rolled_back_and_its_data_skipped",
    "tests/train/test_faults.py::test_bad_shards_are_named",
    "tests/train/test_faults.py::test_other_zero_stages_under_faults",
    "tests/train/test_matrix.py",
    "tests/train/test_replicas.py",
    "tests/train/test_tampering.py::test_a_fault_that_one_rank_reads_ends_the_start_on_every_rank",
    "tests/train/test_signals.py::test_torchrun_saves_and_leaves",
    "tests/train/test_signals.py::test_torchrun_under_nohup_goes_on",
    "tests/train/test_signals.py::test_torchrun_without_the_plugin",
    "tests/train/test_torchrun.py",
    "tests/train/test_traffic.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", action="store_true", help="only the tests of faults, slow ones included"
    )
    parser.addoption("--slow", action="store_true", help="slow tests too, as `make matrix` does")


@pytest.hookimpl(tryfirst=True)  # before -m selects by the marks set here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    faults_only = config.getoption("--faults")
    slow = config.getoption("--slow")
    selected = [
        item
        for item in items
        if (
            item.get_closest_marker("fault")
            if faults_only
            else slow or not item.get_closest_marker("slow")
        )
    ]
    deselected = [item for item in items if item not in selected]
    config.hook.pytest_deselected(items=deselected)
    items[:] = selected
    for item in items:
        if item.nodeid.startswith(GATES):
            item.add_marker("gate")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A function that records a measured figure for the table of faults."""
    return lambda text: request.node.user_properties.append(("measured", text))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    outcome = yield
    marker = item.get_closest_marker("fault")
    if marker is not None:
        outcome.get_result().fault = marker.args


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print a line per fault: outcome, promise, test, measured figures, duration."""
    if not config.getoption("--faults"):
        return
    terminalreporter.section("faults")
    for report in sorted(
        (
            report
            for outcome in ("passed", "failed", "error", "skipped")
            for report in terminalreporter.stats.get(outcome, [])
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
