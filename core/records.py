"""Read our own JSON records from disk: typed, complete, and with errors that name file and key.

A schema is a dataclass; pydantic checks every value against its annotations without converting:
a missing or unknown key, another type, a number out of its range, NaN, text that is no UTF-8 and
nesting without end are each one line.
"""

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from core.errors import InputError

Schema = TypeVar("Schema")
MAX_SHOWN = 60  # characters of a wrong value in a message


class DamagedRecord(InputError):
    """A file of ours that does not hold what its schema says; the message names file and key."""


def read_typed(path: Path, schema: type[Schema]) -> Schema:
    """Read a JSON file as an instance of a dataclass or another annotated type.

    Raises DamagedRecord in one line when the content does not fit, and OSError when the file is
    absent or cannot be read.
    """
    return parse_typed(path.read_bytes(), schema, str(path))


def parse_typed(content: bytes | str, schema: type[Schema], name: str) -> Schema:
    """Parse JSON text as `read_typed` does; `name` stands for the file in messages."""
    try:
        adapter = _adapter(schema)  # type: ignore[arg-type]  # mypy takes no class as hashable
        value: Schema = adapter.validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        raise DamagedRecord(f"{name}: {first_error(error)}") from error
    return value


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def first_error(error: ValidationError) -> str:
    """The first error of a validation in one line: key, value, and what is wrong with it."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return first["msg"]
    if first["type"] in ("missing", "unexpected_keyword_argument"):
        return f"{key} is {'missing' if first['type'] == 'missing' else 'no key of this file'}"
    return f"{key or 'it'} is {shown(first['input'])}: {first['msg']}"


def shown(value: Any) -> str:
    """A value from a file for a message: one line, cut at MAX_SHOWN characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
