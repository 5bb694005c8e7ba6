"""The console of tables."""

import sys

from rich.console import Console

LOG_WIDTH = 120  # of a file or pipe, which has no width


def table_console(width: int | None = None) -> Console:
    """A console that prints texts as they are: `[name]` and `:name:` are no markup.

    `width` in columns; by default that of the terminal, or LOG_WIDTH without one.
    """
    if width is None and not sys.stdout.isatty():
        width = LOG_WIDTH
    return Console(width=width, markup=False, emoji=False)
