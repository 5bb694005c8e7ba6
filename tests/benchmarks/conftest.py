"""The small checkpoint of eval's tests, which the benchmark of generation takes too."""

from tests.eval.conftest import config

__all__ = ["config"]
