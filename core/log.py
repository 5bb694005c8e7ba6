"""Console logging with a rank filter: information from rank 0 only, warnings from every rank.

`logging.getLogger(__name__).info(...)` and `.warning(...)` print on standard output, `.error(...)`
on standard error, warnings and errors prefixed with their level. The result of a command (a table,
generated text) is printed with `print`. rich redirects lines above a terminal's live progress bar.
"""

import io
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
    """Attach the console handler to our packages' loggers, once; leave other loggers unchanged.

    Also makes standard output and error usable where they are closed, or cannot show a character.
    """
    _open_streams()
    handler = ConsoleHandler()
    handler.addFilter(RankFilter())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(other, ConsoleHandler) for other in logger.handlers):
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False


def _open_streams() -> None:
    """Open closed standard streams on /dev/null; escape what a stream cannot encode.

    A file of the run would otherwise get the number of a closed one, and what C code prints.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and number:
            stream.reconfigure(errors="backslashreplace")


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
