"""From a command line to typed configuration, and from a user's mistake to one clear line.

Every entry script is `@command(Schema)` over a function of that schema. Hydra composes configs/
with the overrides; the sections that the schema names are converted to dataclasses (wrong keys and
types are refused, __post_init__ checks run); nothing untyped survives.
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
    """A script's --help: its docstring with examples. $ is doubled, as Hydra replaces $NAME."""
    return format_commands(sys.modules["__main__"].__doc__ or "").strip().replace("$", "$$")


OmegaConf.register_new_resolver("script_help", script_help)


OmegaConf.register_new_resolver("times", lambda a, b: a * b)
OmegaConf.register_new_resolver("ceil_div", lambda a, b: -(-a // b))


def compose_config(overrides: Iterable[str], *, hydra_config: bool = False) -> DictConfig:
    """The config that a command line with these overrides gets; with Hydra's own part if asked."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        words = renamed_overrides(overrides)
        return compose("config", words, return_hydra_config=hydra_config)


def convert(schema: type[Schema], config: DictConfig, given: Collection[str] = ()) -> Schema:
    """The sections of a composed config that `schema` names, checked and typed; other sections are
    left alone. Keys that the command line gave win over old names of the same keys in files.
    """
    rename_keys(config, "the config", given)
    if OmegaConf.is_missing(config.run, "name"):
        names = sorted(path.stem for path in Path(CONFIGS, "experiment").glob("*.yaml"))
        raise InputError(f"no experiment chosen: add +experiment=NAME, one of {', '.join(names)}")
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
    """Turn 1e9 into 1000000000 where the schema wants an integer, so that token counts can be
    written either way.

    A value in the place of a section is refused on the way, with the section's keys.
    """
    for key, wanted in get_type_hints(schema).items():
        if key not in values or OmegaConf.is_missing(values, key):
            continue
        value = values[key]
        kinds: tuple[Any, ...] = (wanted, *get_args(wanted))
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if inner is None:
            if wanted in (int, int | None) and isinstance(value, float) and value.is_integer():
                values[key] = int(value)
        elif get_origin(wanted) in (list, dict):
            entries = value.values() if isinstance(value, DictConfig) else value
            for entry in entries if OmegaConf.is_config(value) else ():  # else to_object says it
                if isinstance(entry, DictConfig):
                    floats_to_ints(inner, entry, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif isinstance(value, DictConfig):
            floats_to_ints(inner, value, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif inner is wanted:
            known = ", ".join(f"{prefix}{key}.{field.name}" for field in dataclasses.fields(inner))
            raise InputError(
                f"{prefix}{key} is a section, not a value: set one of its keys, {known}"
            )


def command(schema: type[Schema]) -> Callable[[Callable[[Schema], None]], Callable[[], None]]:
    """Make an entry point: compose, convert, run; exit 2 with one line on a mistake in config or
    input, or when the system refuses a file.

    HYDRA_FULL_ERROR=1 in the environment shows the traceback instead.
    """
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    def decorate(main: Callable[[Schema], None]) -> Callable[[], None]:
        composed: list[DictConfig] = []
        # hydra's part ends with the composed config, so that what follows is not dressed in its own
        # error handling
        compose_argv = hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")(
            composed.append
        )

        def run() -> None:
            log.set_up()
            # hydra passes exceptions on; the line below is ours
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
    """convert, with a failed check of a section as an InputError."""
    try:
        return convert(schema, config, given)
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def config_keys(schema: type, prefix: str = "") -> list[str]:
    """The keys below a schema, as a command line writes them."""
    keys = []
    for name, kind in get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            keys += config_keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            keys.append(f"{prefix}{name}")
    return keys


def format_error(error: Exception, keys: Iterable[str] = ()) -> str:
    """The message of an error on one line, with the full key where the config library knows it.

    An unknown key is answered with the nearest of `keys`.
    """
    # hydra's own advice, to append it with a +, would be refused next
    if match := UNKNOWN_KEY.match(str(error)):
        near = [f"did you mean {key}?" for key in difflib.get_close_matches(match[1], keys, 1)]
        return " ".join([f"the config has no key {match[1]};", *near, "--cfg job prints them all"])
    if match := UNKNOWN_CHOICE.search(str(error)):
        return f"{match[1]} has no {match[2]}; it has {', '.join(match[3].split())}"
    if (match := UNKNOWN_GROUP.match(str(error))) and match[1] in REMOVED_GROUPS:
        suite = " (a leaderboard: override /suite)" if match[1] == "eval" else ""
        return (
            f"{match[1]} is no config group any more but a section of config.yaml: remove "
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
