"""What the dataclasses of a config say about its keys: names, entries, defaults, and numbers."""

import dataclasses
from collections.abc import Collection, Mapping
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import InputError
from core.quote import CONTROL
from core.ranges import number, range_of

MAY_HAVE_LINES = ("generate.prompt",)
MAY_BE_EMPTY = ("generate.prompt", "slurm.env.")
ENTRY = "*"  # stands for a name or number in a key with entries: data.sources.*.text_key


def without_none(kind: Any) -> Any:
    """The type T of `T | None`; other types unchanged."""
    if get_origin(kind) in (Union, UnionType):
        return next(each for each in get_args(kind) if each is not type(None))
    return kind


def config_keys(schema: type, prefix: str = "") -> list[str]:
    """The dotted keys of a schema, as on a command line, with ENTRY for a list's or dict's entry.

    A list or dict whose entries are no sections is one key.
    """
    keys = []
    for name, hint in get_type_hints(schema).items():
        kind, key = without_none(hint), f"{prefix}{name}"
        if get_origin(kind) in (list, dict) and dataclasses.is_dataclass(get_args(kind)[-1]):
            kind, key = get_args(kind)[-1], f"{key}.{ENTRY}"
        if dataclasses.is_dataclass(kind):
            keys += config_keys(kind, f"{key}.")  # type: ignore[arg-type]
        else:
            keys.append(key)
    return keys


def covers(keys: Collection[str], key: str) -> bool:
    """Whether one of `keys` is the key or a section that contains it."""
    return any(f"{key}.".startswith(f"{section}.") for section in keys)


def may_be_absent(schemas: Collection[type], key: str) -> bool:
    """Whether a valid config can lack a key: one with a default, or an entry of a dict.

    Raises InputError for an entry of a list that is not given by its number.
    """
    return any(_may_be_absent(schema, key) for schema in schemas)


def _may_be_absent(schema: type, key: str) -> bool:
    kind: Any = schema
    in_default = is_absent = False
    passed: list[str] = []
    for part in key.split("."):
        kind = without_none(kind)
        if dataclasses.is_dataclass(kind):
            field = next((each for each in dataclasses.fields(kind) if each.name == part), None)
            if field is None:
                return False
            missing = dataclasses.MISSING
            in_default |= (field.default, field.default_factory) != (missing, missing)
            is_absent, kind = in_default, get_type_hints(kind)[part]
        elif get_origin(kind) is dict:
            is_absent, kind = True, get_args(kind)[1]
        elif get_origin(kind) is list:
            if not part.isdecimal():
                name = ".".join(passed)
                raise InputError(
                    f"{name} is a list, and {part} is no number: {name}.0 is its first entry"
                )
            is_absent, kind = False, get_args(kind)[0]
        else:
            return False
        passed.append(part)
    return is_absent


def floats_to_ints(schema: type, values: DictConfig, prefix: str = "") -> None:
    """Convert whole floats such as 1e9 to int where the schema expects an int, in place.

    Raises InputError with the section's keys where a section is given a value.
    """
    for key, expected in get_type_hints(schema).items():
        if key not in values or OmegaConf.is_missing(values, key):
            continue
        try:
            value = values[key]
        except OmegaConfBaseException:  # an interpolation of a wrong value, which is reported first
            continue
        kinds: tuple[Any, ...] = (expected, *get_args(expected))
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if get_origin(expected) is dict and OmegaConf.is_list(value):
            raise InputError(f"{prefix}{key} is a list: write its entries as {{NAME: VALUE}}")
        if get_origin(expected) is list and OmegaConf.is_dict(value):
            raise InputError(f"{prefix}{key} has names for its entries: write a list, [VALUE, ...]")
        if get_origin(expected) is list and value is not None and not OmegaConf.is_list(value):
            raise InputError(f"{prefix}{key} is a list: write {prefix}{key}=[{value}]")
        if inner is None:
            if expected in (int, int | None) and isinstance(value, float) and value.is_integer():
                values[key] = int(value)
        elif get_origin(expected) in (list, dict):
            entries: Any = ()  # to_object reports a value that is no list or dict
            if OmegaConf.is_config(value):
                entries = value.items() if isinstance(value, DictConfig) else enumerate(value)
            for name, entry in entries:
                if isinstance(entry, DictConfig):
                    floats_to_ints(inner, entry, f"{prefix}{key}.{name}.")  # type: ignore[arg-type]
        elif isinstance(value, DictConfig):
            floats_to_ints(inner, value, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif inner is expected:
            known = ", ".join(f"{prefix}{key}.{field.name}" for field in dataclasses.fields(inner))
            raise InputError(
                f"{prefix}{key} is a section and takes no value: set one of its keys, {known}"
            )


@cache
def _annotated(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def check_values(kind: Any, value: Any, key: str = "") -> None:
    """Raise InputError for an empty text, one with a line break or control character, and for what
    is no number of the range that its field declares.

    `value` has dicts for the dataclasses of `kind`, as OmegaConf.to_container returns them.
    Interpolations and missing values are not checked.
    """
    kind = without_none(kind)
    limits = range_of(kind)
    hints: Mapping[Any, Any] = {}
    entry_kind: Any = None
    if dataclasses.is_dataclass(kind):
        schema: Any = kind
        hints = _annotated(schema)
    elif get_origin(kind) in (list, dict):
        entry_kind = get_args(kind)[-1]
    if limits is not None:
        if value is None or (isinstance(value, str) and value.startswith(("${", "???"))):
            return
        expected = get_args(kind)[0]
        value = number(value, expected) if isinstance(value, str) else value
        if problem := limits.problem(value, expected):
            raise InputError(f"{key} {problem}")
    elif isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(hints.get(name, entry_kind), entry, f"{key}.{name}" if key else str(name))
    elif value == "" and not key.startswith(MAY_BE_EMPTY):
        raise InputError(
            f"{key} is empty: set it (to null where that is allowed); a variable "
            "of the shell may be unset"
        )
    elif isinstance(value, str) and CONTROL.search(value) and not key.startswith(MAY_HAVE_LINES):
        raise InputError(f"{key} is {value!r}: remove its line break or control character")
