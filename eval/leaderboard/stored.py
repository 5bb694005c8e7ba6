"""Stored scores of leaderboard suites: `scores/SUITE-MODEL.json` in a run's folder."""

from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from core.ranges import Finite, Whole
from core.records import read_or_rebuild


class StoredRow(TypedDict):
    """Result of a row, with the settings that it was scored with; in percent."""

    row: dict[str, Any]
    score: Finite
    stderr: Finite | None


class StoredSuite(TypedDict):
    """A file of scores; further keys say what was scored."""

    suite: str
    tokens: NotRequired[Whole]
    checkpoint: NotRequired[str]
    complete: bool
    rows: dict[str, StoredRow]
    missing: NotRequired[dict[str, str]]  # row -> error


def read_stored(path: Path, consequence: str) -> dict[str, Any]:
    """Read a file of scores; empty if it is absent or damaged, which is a warning."""
    stored: Any = read_or_rebuild(path, StoredSuite, consequence, extra="allow")
    return stored or {}
