"""Entry scripts: from a command line to a function's typed config, and one-line errors.

An entry script is a function decorated with `@command(Schema)`. Hydra composes configs/ with the
overrides; the sections named in the schema become dataclasses. Wrong keys and types are errors, and
__post_init__ checks run.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core import log
from core.compose import CONFIGS, compose_config, composing, convert
from core.config_errors import format_error
from core.entry import format_commands
from core.errors import InputError, exit_with_error
from core.launcher import check_launcher, check_text
from core.old_keys import given_keys
from core.overrides import parse_arguments, rewrite_overrides
from core.schema import config_keys
from core.sweep import read_sweep

Schema = TypeVar("Schema")
CONFIG_ERRORS = (InputError, HydraException, OmegaConfBaseException, OSError)


def script_help() -> str:
    """--help of a script: its docstring. Doubles $, since Hydra replaces $NAME."""
    return format_commands(sys.modules["__main__"].__doc__ or "").strip().replace("$", "$$")


OmegaConf.register_new_resolver("script_help", script_help)


def command(schema: type[Schema]) -> Callable[[Callable[[Schema], None]], Callable[[], None]]:
    """Decorate the function of an entry script: compose the config, convert it, call the function.

    With -m the function is called for each point of the sweep. Errors of config, input or the file
    system exit with code 2 and one line; HYDRA_FULL_ERROR=1 in the environment shows the traceback
    instead.
    """
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    def decorate(main: Callable[[Schema], None]) -> Callable[[], None]:
        def run() -> None:
            log.init_logger()
            try:
                words = sys.argv[1:]
                check_text(words)
                check_launcher()
                arguments = parse_arguments(words)
                if shows_only(arguments):
                    show(words, arguments, schema)
                    return
                for config in read_configs(schema, arguments):
                    main(config)
            except CONFIG_ERRORS as error:
                if show_traceback:
                    raise
                exit_with_error(format_commands(format_error(error, config_keys(schema))))

        return run

    return decorate


def shows_only(arguments: argparse.Namespace) -> bool:
    """Whether an option asks for help or for the config in place of the command."""
    options = ("help", "hydra_help", "cfg", "info", "shell_completion")
    return any(getattr(arguments, option) for option in options)


def show(words: Sequence[str], arguments: argparse.Namespace, schema: type) -> None:
    """Let Hydra print help or the config, of the same overrides as a run's."""
    options = [word for word in words if word not in arguments.overrides]
    sys.argv[1:] = [*options, *rewrite_overrides(arguments.overrides, [schema])]
    # makes Hydra raise exceptions, which the caller formats; not for child processes of commands
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with composing(arguments.config_dir):
        hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")(lambda _: None)()


def read_configs(schema: type[Schema], arguments: argparse.Namespace) -> list[Schema]:
    """The typed config of a command line, or with -m those of all points of its sweep."""
    config_dir = arguments.config_dir
    runs = [arguments.overrides]
    sweep = None
    if arguments.multirun:
        check_multirun(schema, arguments.overrides)
        sweep = read_sweep(arguments.overrides, [schema], config_dir=config_dir)
        runs = list(sweep.overrides.values())
    configs = []
    for overrides in runs:
        config = compose_config(overrides, config_dir=config_dir, schemas=[schema])
        configs.append(convert(schema, config, given_keys(overrides)))
    if sweep is not None:
        sweep.write()
    return configs


def check_multirun(schema: type, overrides: Sequence[str]) -> None:
    """Raise InputError where one process cannot call a command for each point of a sweep."""
    fields = dataclasses.fields(schema)
    if "run" not in [field.name for field in fields]:
        raise InputError(
            "-m makes a run of each point, and this command reads no run: give one value at a time"
        )
    if "LOCAL_RANK" in os.environ:
        raise InputError(
            "torchrun starts the ranks of one run: for a sweep use python launch/submit.py -m "
            f"{' '.join(overrides)} --local"
        )
