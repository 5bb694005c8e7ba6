"""Fixtures shared by the tests of training."""

from pathlib import Path

import pytest

from tests.train.world import run_all


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all runs of tests/train/world.py; return their folder."""
    folder = tmp_path_factory.mktemp("world")
    run_all(folder)
    return folder
