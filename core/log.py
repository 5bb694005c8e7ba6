"""What a process says while it works, by Python's logging: information of the first rank, warnings
of every one.

`logging.getLogger(__name__).info(...)` and `.warning(...)` print on standard output, `.error(...)`
on standard error; a warning and an error begin with their level. Output that a command is for (a
table, a generated text) is printed instead. A terminal's live bar keeps its place: rich redirects
what is written meanwhile above it.
"""

import logging
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

ALL_RANKS = {"all_ranks": True}  # extra= of a line that other ranks say too
PACKAGES = (
    "core",
    "model",
    "data",
    "eval",
    "train",
    "launch",
    "examples",
    "benchmarks",
    "__main__",
)


class RankFilter(logging.Filter):
    """Passes the first rank's information, all warnings, and lines marked for all ranks."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is said."""
        first = os.environ.get("RANK", "0") == "0"
        return first or record.levelno >= logging.WARNING or getattr(record, "all_ranks", False)


class ConsoleHandler(logging.Handler):
    """Writes to the current stdout, errors to stderr; ignores a full disk or a closed pipe."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        stream = sys.stdout if record.levelno < logging.ERROR else sys.stderr
        with suppress(OSError):
            stream.write(f"{level}{record.getMessage()}\n")
            stream.flush()


def set_up() -> None:
    """Give our loggers this handler, once; those of libraries stay as they are."""
    handler = ConsoleHandler()
    handler.addFilter(RankFilter())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(other, ConsoleHandler) for other in logger.handlers):
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False


class BestEffortStream:
    """Standard output that a full disk or a closed pipe behind it cannot turn into an error."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
