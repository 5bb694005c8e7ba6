"""What several files of these tests compare."""

from pathlib import Path

import pytest

from tests.train.world import run_all


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of tests/train/world.py."""
    folder = tmp_path_factory.mktemp("world")
    run_all(folder)
    return folder
