"""The small checkpoint of tests/eval, for the generation benchmark."""

from tests.eval.conftest import config

__all__ = ["config"]
