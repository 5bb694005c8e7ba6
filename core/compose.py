"""From overrides to a typed config: Hydra composes configs/, dataclasses type and check it."""

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.config_errors import explain_unreadable
from core.errors import InputError
from core.files import ROOT
from core.old_keys import rename_keys
from core.overrides import ADDED_GROUPS, own_config_dir, rewrite_overrides
from core.quote import uninterpolated
from core.schema import check_values, floats_to_ints

CONFIGS = str(ROOT / "configs")
Schema = TypeVar("Schema")

OmegaConf.register_new_resolver("times", lambda a, b: a * b)
OmegaConf.register_new_resolver("ceil_div", lambda a, b: -(-a // b))


def compose_config(
    overrides: Iterable[str],
    *,
    config_dir: str | None = None,
    schemas: Collection[type] = (),
    hydra_config: bool = False,
) -> DictConfig:
    """Compose the config of a command line with these overrides.

    `config_dir` has files beside ours. Keys of `schemas` that the files leave out can be set.
    `hydra_config` adds Hydra's own section. Raises InputError and Hydra's errors.
    """
    current = rewrite_overrides(overrides, schemas)
    with composing(config_dir), initialize_config_dir(CONFIGS, version_base="1.3"):
        if config_dir is not None:
            search_path = create_config_search_path(CONFIGS)
            folder = f"file://{os.path.abspath(config_dir)}"
            search_path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("app", search_path)
        return compose("config", current, return_hydra_config=hydra_config)


@contextmanager
def composing(config_dir: str | None) -> Iterator[None]:
    """Raise InputError with the file in place of the parser's and Hydra's untyped errors."""
    try:
        yield
    except (InputError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        own = [] if config_dir is None else [Path(config_dir)]
        raise explain_unreadable(error, [*own, Path(CONFIGS)]) from error


def convert(schema: type[Schema], config: DictConfig, given: Collection[str] = ()) -> Schema:
    """Convert the sections of a composed config named in `schema` to dataclasses.

    Other sections are ignored. The keys `given` on the command line override old names of the same
    keys in files. Raises InputError where a check fails, and OmegaConf's errors.
    """
    rename_keys(config, "the config", given)
    if headless := [group for group in ADDED_GROUPS if group in config]:
        raise InputError(
            f"a file in {headless[0]}/ sets nothing: its first line must be '# @package _global_', "
            "without a byte order mark"
        )
    if OmegaConf.is_dict(config.run) and OmegaConf.is_missing(config.run, "name"):
        raise InputError(
            f"no experiment: add +experiment=NAME, NAME one of {experiments()}, or set run.name"
        )
    known = section_names()
    if unknown := sorted(str(key) for key in config if key not in known):
        raise InputError(
            f"config has no section {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    names = [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    check_given(config, names)
    # resolved where all sections are: a value may stand for one of a section that is not read
    sections = {name: resolved(config[name]) for name in names if name in config}
    values = OmegaConf.create(sections)
    floats_to_ints(schema, values)
    check_values(schema, OmegaConf.to_container(values))  # before an int beyond every float
    merged = OmegaConf.merge(OmegaConf.structured(schema), values)
    check_values(schema, OmegaConf.to_container(merged, resolve=True))
    try:
        typed: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    return typed


def resolved(section: Any) -> Any:
    """A section as plain dicts and lists, with the values of its interpolations as they are."""
    if OmegaConf.is_config(section):
        section = OmegaConf.to_container(section, resolve=True)
    if isinstance(section, dict):
        return {key: resolved(value) for key, value in section.items()}
    if isinstance(section, list):
        return [resolved(value) for value in section]
    return uninterpolated(section) if isinstance(section, str) else section


def check_given(config: DictConfig, sections: Collection[str]) -> None:
    """Raise InputError, with the overrides, if values are missing that an experiment leaves open.

    An experiment leaves them open by `???`, and run.init_from, where null means none, by "".
    """
    plain = OmegaConf.to_container(config)
    missing = ["run.init_from"] if OmegaConf.select(config, "run.init_from") == "" else []
    for name in sections:
        missing += missing_keys(plain.get(name), name)  # type: ignore[union-attr]
    if missing:
        overrides = " ".join(f"{key}=VALUE" for key in missing)
        raise InputError(f"the experiment leaves values to you: add {overrides}")


def missing_keys(value: object, key: str) -> list[str]:
    """The keys under `key` with the value ???; interpolations are not read, which may fail."""
    if isinstance(value, dict):
        return [inner for name in value for inner in missing_keys(value[name], f"{key}.{name}")]
    return [key] if value == "???" else []


@cache  # reading the file takes as long as the rest of a conversion
def section_names() -> frozenset[str]:
    """The sections and groups of configs/."""
    primary = {str(key) for key in OmegaConf.load(Path(CONFIGS, "config.yaml"))}
    groups = {path.name for path in Path(CONFIGS).iterdir() if path.is_dir()}
    return frozenset(primary | groups) - {"defaults", "hydra"}


def experiments() -> str:
    """The names of all experiments, ours and the user's."""
    folders = [CONFIGS, *filter(None, [own_config_dir()])]
    names = {path.stem for folder in folders for path in Path(folder, "experiment").glob("*.yaml")}
    return ", ".join(sorted(names))
