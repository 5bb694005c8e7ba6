"""Console logging with a rank filter: information from rank 0 only, warnings from every rank.

`logging.getLogger(__name__).info(...)` and `.warning(...)` print on standard output, `.error(...)`
on standard error, warnings and errors prefixed with their level. The result of a command (a table,
generated text) is printed with `print`. rich redirects lines above a terminal's live progress bar.
"""

import logging
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

ALL_RANKS = {"all_ranks": True}  # extra= of a line that every rank prints
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
    """Passes rank 0's information, all warnings, and lines marked with ALL_RANKS."""

    def filter(self, record: logging.LogRecord) -> bool:
        is_first = os.environ.get("RANK", "0") == "0"
        return is_first or record.levelno >= logging.WARNING or getattr(record, "all_ranks", False)


class ConsoleHandler(logging.Handler):
    """Writes to stdout, errors to stderr; ignores a full disk or a closed pipe."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        stream = sys.stdout if record.levelno < logging.ERROR else sys.stderr
        with suppress(OSError):
            stream.write(f"{level}{record.getMessage()}\n")
            stream.flush()


def init_logger() -> None:
    """Attach the console handler to our packages' loggers, once; leave other loggers unchanged."""
    handler = ConsoleHandler()
    handler.addFilter(RankFilter())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(other, ConsoleHandler) for other in logger.handlers):
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False


class BestEffortStream:
    """A text stream whose writes never raise OSError on a full disk or a closed pipe."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
