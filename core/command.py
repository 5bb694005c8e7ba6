"""Entry scripts: from a command line to a typed config, and one-line errors.

An entry script is a function decorated with `@command(Schema)`. Hydra composes configs/ with the
overrides; the sections named in the schema become dataclasses. Wrong keys and types are errors, and
__post_init__ checks run.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import hydra
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core import log
from core.entry import format_commands
from core.errors import InputError, exit_with_error
from core.files import ROOT
from core.old_keys import REMOVED_GROUPS, given_keys, rename_keys, renamed_overrides

CONFIGS = str(ROOT / "configs")
UNKNOWN_GROUP = re.compile(
    r".*Could not override '(\w+)(?:@[^']*)?'\.\s*No match in the defaults", re.S
)
UNKNOWN_CHOICE = re.compile(
    r"Could not find '(\w+)/([^']+)'\s+Available options in [^\n]*:((?:\n\t[^\n]+)+)"
)
UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
Schema = TypeVar("Schema")


def script_help() -> str:
    """--help of a script: its docstring. Doubles $, since Hydra replaces $NAME."""
    return format_commands(sys.modules["__main__"].__doc__ or "").strip().replace("$", "$$")


OmegaConf.register_new_resolver("script_help", script_help)


OmegaConf.register_new_resolver("times", lambda a, b: a * b)
OmegaConf.register_new_resolver("ceil_div", lambda a, b: -(-a // b))


def compose_config(overrides: Iterable[str], *, hydra_config: bool = False) -> DictConfig:
    """Compose the config of a command line with these overrides.

    `hydra_config` adds Hydra's own section.
    """
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        current = renamed_overrides(overrides)
        return compose("config", current, return_hydra_config=hydra_config)


def convert(schema: type[Schema], config: DictConfig, given: Collection[str] = ()) -> Schema:
    """Convert the sections of a composed config named in `schema` to dataclasses.

    Other sections are ignored. The keys `given` on the command line override old names of the same
    keys in files.
    """
    rename_keys(config, "the config", given)
    if OmegaConf.is_missing(config.run, "name"):
        names = sorted(path.stem for path in Path(CONFIGS, "experiment").glob("*.yaml"))
        raise InputError(f"no experiment: add +experiment=NAME, NAME one of {', '.join(names)}")
    primary = set(OmegaConf.load(Path(CONFIGS, "config.yaml"))) - {"defaults", "hydra"}
    known = primary | {path.name for path in Path(CONFIGS).iterdir() if path.is_dir()}
    if unknown := sorted(str(key) for key in config if key not in known):
        raise InputError(
            f"config has no section {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    names = [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    sections = {name: config[name] for name in names if name in config}
    values = OmegaConf.create(sections)
    floats_to_ints(schema, values)
    typed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    return typed


def floats_to_ints(schema: type, values: DictConfig, prefix: str = "") -> None:
    """Convert whole floats such as 1e9 to int where the schema expects an int, in place.

    Raises InputError with the section's keys where a section is given a value.
    """
    for key, expected in get_type_hints(schema).items():
        if key not in values or OmegaConf.is_missing(values, key):
            continue
        value = values[key]
        kinds: tuple[Any, ...] = (expected, *get_args(expected))
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if inner is None:
            if expected in (int, int | None) and isinstance(value, float) and value.is_integer():
                values[key] = int(value)
        elif get_origin(expected) in (list, dict):
            entries = value.values() if isinstance(value, DictConfig) else value
            # to_object reports a value that is no list or dict
            for entry in entries if OmegaConf.is_config(value) else ():
                if isinstance(entry, DictConfig):
                    floats_to_ints(inner, entry, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif isinstance(value, DictConfig):
            floats_to_ints(inner, value, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif inner is expected:
            known = ", ".join(f"{prefix}{key}.{field.name}" for field in dataclasses.fields(inner))
            raise InputError(
                f"{prefix}{key} is a section and takes no value: set one of its keys, {known}"
            )


def command(schema: type[Schema]) -> Callable[[Callable[[Schema], None]], Callable[[], None]]:
    """Decorate the function of an entry script: compose the config, convert it, call the function.

    Errors of config, input or the file system exit with code 2 and one line; HYDRA_FULL_ERROR=1 in
    the environment shows the traceback instead.
    """
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    def decorate(main: Callable[[Schema], None]) -> Callable[[], None]:
        composed: list[DictConfig] = []
        # hydra.main only composes the config, so that its error handling does not wrap `main`
        compose_argv = hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")(
            composed.append
        )

        def run() -> None:
            log.init_logger()
            # makes hydra raise exceptions; the handler below formats them
            os.environ["HYDRA_FULL_ERROR"] = "1"
            sys.argv[1:] = renamed_overrides(sys.argv[1:])
            given = given_keys(sys.argv[1:])
            try:
                compose_argv()
                for config in composed:
                    main(convert_checked(schema, config, given))
            except (InputError, HydraException, OmegaConfBaseException, OSError) as error:
                if show_traceback:
                    raise
                exit_with_error(format_commands(format_error(error, config_keys(schema))))

        return run

    return decorate


def convert_checked(
    schema: type[Schema], config: DictConfig, given: Collection[str] = ()
) -> Schema:
    """Convert, and raise InputError where a check of a section fails."""
    try:
        return convert(schema, config, given)
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def config_keys(schema: type, prefix: str = "") -> list[str]:
    """The dotted keys of a schema, as on a command line."""
    keys = []
    for name, kind in get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            keys += config_keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            keys.append(f"{prefix}{name}")
    return keys


def format_error(error: Exception, keys: Iterable[str] = ()) -> str:
    """Format an error as one line, with the full config key if known.

    For an unknown key the line suggests the closest of `keys`.
    """
    # hydra advises to append the key with a +, which would be the next error
    if match := UNKNOWN_KEY.match(str(error)):
        hints = [f"did you mean {key}?" for key in difflib.get_close_matches(match[1], keys, 1)]
        return " ".join([f"the config has no key {match[1]};", *hints, "--cfg job prints all keys"])
    if match := UNKNOWN_CHOICE.search(str(error)):
        return f"{match[1]} has no {match[2]}; it has {', '.join(match[3].split())}"
    if (match := UNKNOWN_GROUP.match(str(error))) and match[1] in REMOVED_GROUPS:
        suite = " (a leaderboard: override /suite)" if match[1] == "eval" else ""
        return (
            f"{match[1]} is now a section of config.yaml, not a config group: remove "
            f"'override /{match[1]}'{suite}"
        )
    key = getattr(error, "full_key", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [
        line
        for line in lines
        if not line.startswith(("full_key:", "object_type=", "reference_type="))
    ]
    if error.__cause__ is not None and isinstance(error, HydraException):
        lines += [
            line.strip()
            for line in str(error.__cause__).splitlines()[:1]
            if line.strip() not in lines
        ]
    return (f"{key}: " if key else "") + "; ".join(lines)
