"""Arguments of a command: Hydra's options, and overrides rewritten so that every key can be set."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from core.errors import InputError
from core.old_keys import renamed_overrides
from core.quote import hydra_override
from core.schema import may_be_absent

# an override without the list of an index: data.stages[0].tokens
ARGUMENT = re.compile(r"(\+\+|\+|~)?([\w./@:-]+(?:\[\d+\][\w./@:-]*)*)(?:=(.*))?", re.S | re.A)
ADDED_GROUPS = ("experiment", "sweep")  # not in the defaults list: Hydra asks for a plus
CONFIG_DIR = "--config-dir"


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line as Hydra does. Raises InputError where argparse would exit."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists overrides and groups")

    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args(words)
    if arguments.config_path is not None or arguments.experimental_rerun is not None:
        raise InputError(f"configs of your own are read by {CONFIG_DIR} FOLDER")
    check_config_dir(arguments.config_dir)
    return arguments


def check_config_dir(folder: str | None) -> None:
    """Raise InputError if the folder of a user's own configs does not exist."""
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"{CONFIG_DIR} {folder} is not a folder: name one with experiment/ in it")


def config_dir_options(folder: str | None) -> list[str]:
    """The option that makes another command read the same configs from any working folder."""
    return [] if folder is None else [CONFIG_DIR, os.path.abspath(folder)]


def own_config_dir() -> str | None:
    """The folder of own configs on this process's command line."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument(CONFIG_DIR, "-cd")
    folder: str | None = options.parse_known_args(sys.argv[1:])[0].config_dir
    return folder


def rewrite_overrides(
    overrides: Iterable[str], schemas: Collection[type] = (), *, sweep: bool = False
) -> list[str]:
    """Overrides as Hydra takes them: current names, entries of lists by `.0`, and a plus where the
    config may lack the key.

    Raises InputError, with the quoting that helps, for what Hydra cannot read, and unless `sweep`
    for several values.
    """
    rewritten = []
    for word in renamed_overrides(overrides):
        match = ARGUMENT.fullmatch(word)
        if match is None:
            raise InputError(
                f"cannot read the argument {shlex.quote(word)}: write KEY=VALUE, with "
                "quotation marks for the shell around all of it if it has spaces"
            )
        prefix, key, value = match.groups()
        key = re.sub(r"\[(\d+)\]", r".\1", key)
        if prefix is None and key in ADDED_GROUPS:
            prefix = "+"
        elif prefix is None and value is not None and may_be_absent(schemas, key):
            prefix = "++"
        word = (prefix or "") + key + ("" if value is None else f"={value}")
        if value is not None and value.startswith("~/"):  # which shells keep after KEY=
            word = (prefix or "") + hydra_override(key, os.path.expanduser(value))
        parsed = parse_override(word, key, value)
        if parsed.is_sweep_override() and not sweep:
            raise InputError(
                f"{key} has several values: write a text as {quoted(key, value)}, a list as "
                f"{shlex.quote(f'{key}=[{value}]')}; -m makes a run of each value"
            )
        rewritten.append(word)
    return rewritten


def parse_override(word: str, key: str, value: str | None) -> Override:
    """Parse one override. Raises InputError with the argument and how to quote it."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        if value is None:
            raise InputError(
                f"the argument {word} has no value: write {key}=VALUE, or ~{key} to remove it; a "
                "value with spaces needs quotation marks"
            ) from error
        inside = " (or the texts inside the list)" if value[:1] in ("[", "{") else ""
        raise InputError(
            f"cannot read the value in {shlex.quote(word)}: quote it{inside} for Hydra and for "
            f"the shell: {quoted(key, value)}"
        ) from error


def quoted(key: str, value: str | None) -> str:
    """An override that sets a text, as it is typed in a shell."""
    text = QuotedString(os.path.expanduser(value or ""), Quote.double).with_quotes()
    return shlex.quote(f"{key}={text}")
