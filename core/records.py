"""Read our own JSON records from disk: typed, complete, and with errors that name file and key.

A schema is a dataclass; pydantic checks every value against its annotations without converting:
a missing or unknown key, another type, a number out of its range, NaN, text that is no UTF-8 and
nesting without end are each one line. In a JSON Lines file a damaged line costs only that line.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from core.errors import InputError
from core.files import open_regular, read_regular

logger = logging.getLogger(__name__)

Schema = TypeVar("Schema")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
MAX_SHOWN = 60  # characters of a wrong value in a message
MAX_LINES = 10  # damaged lines that a message numbers
MAX_LINE_BYTES = 2**24  # of a line that is parsed; a crash may leave a block of zeros
TAIL_BYTES = 2**18  # of a block that is read from the end of a file
BLOCKED = (IsADirectoryError, NotADirectoryError, PermissionError)
UNREADABLE = (FileNotFoundError, *BLOCKED)
Extra = Literal["allow", "ignore", "forbid"]  # of keys that a schema lacks
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
_reported: set[str] = set()  # texts or keys of damage that this process has reported


class DamagedRecord(InputError):
    """A file of ours that does not hold what its schema says; the message names file and key."""


def read_typed(path: Path, schema: type[Schema]) -> Schema:
    """Read a JSON file as an instance of a dataclass or another annotated type.

    Raises DamagedRecord in one line when the content does not fit, and OSError when the file is
    absent or cannot be read.
    """
    return parse_typed(read_regular(path), schema, str(path))


def read_required(path: Path, schema: type[Schema], fix: str, extra: Extra = "forbid") -> Schema:
    """Read a JSON file as `read_typed` does; keys that the schema lacks as `extra` says.

    Raises DamagedRecord, which ends with the fix, if it is absent, damaged or no readable file.
    """
    try:
        return parse_typed(read_regular(path), schema, str(path), extra)
    except UNREADABLE as error:
        raise DamagedRecord(f"{path} cannot be read ({error.strerror}): {fix}") from error
    except DamagedRecord as error:
        raise DamagedRecord(f"{error}: {fix}") from error


def read_if_present(
    path: Path, schema: type[Schema], fix: str, extra: Extra = "forbid"
) -> Schema | None:
    """Read a JSON file as `read_required` does; None if it is absent."""
    return read_required(path, schema, fix, extra) if os.path.lexists(path) else None


def read_or_rebuild(
    path: Path, schema: type[Schema], consequence: str, extra: Extra = "forbid"
) -> Schema | None:
    """Read a JSON file that is rebuilt if it is damaged; None if it is absent or damaged.

    Damage is a warning that ends with its consequence. Raises DamagedRecord where the path is no
    readable file, which nothing can be written over.
    """
    try:
        return parse_typed(read_regular(path), schema, str(path), extra)
    except FileNotFoundError:
        return None
    except BLOCKED as error:
        raise DamagedRecord(f"{path} cannot be read ({error.strerror}): move it away") from error
    except DamagedRecord as error:
        report_once(f"{error}: {consequence}")
        return None


def parse_typed(
    content: bytes | str, schema: type[Schema], name: str, extra: Extra = "forbid"
) -> Schema:
    """Parse JSON text as `read_typed` does; `name` stands for the file in messages."""
    try:
        value: Schema = _adapter(schema).validate_json(content, strict=True, extra=extra)
        return value
    except ValidationError as error:
        raise DamagedRecord(f"{name}: {first_error(error)}") from error


def check_typed(value: Any, schema: type[Schema], name: str, extra: Extra = "forbid") -> Schema:
    """Check a value that another parser read, such as YAML; `name` stands for the file."""
    try:
        checked: Schema = _adapter(schema).validate_python(value, strict=True, extra=extra)
        return checked
    except ValidationError as error:
        raise DamagedRecord(f"{name}: {first_error(error)}") from error


@dataclass
class Damage:
    """Damaged lines of a JSON Lines file; they stay in the file and are not read."""

    path: Path
    count: int = 0
    numbers: list[int] = field(default_factory=list)  # of the first MAX_LINES, from 1
    first: str = ""  # what is wrong with the first

    def add(self, number: int, reason: str) -> None:
        """Count a damaged line."""
        self.count += 1
        self.first = self.first or reason
        if len(self.numbers) < MAX_LINES:
            self.numbers.append(number)

    def report(self, report: Callable[[str], None] = logger.warning) -> None:
        """Report all damaged lines in one line, once per process."""
        if self.count:
            lines = ", ".join(map(str, self.numbers)) + (", ..." * (self.count > MAX_LINES))
            number = "1 damaged line is" if self.count == 1 else f"{self.count} damaged lines are"
            text = f"{self.path}: {number} not read (line {lines}): {self.first}"
            # without the numbers, which a cut changes
            report_once(text, report, key=f"{self.path} {self.count} {self.first}")


def scan_lines(
    path: Path, schema: type[Schema], damage: Damage
) -> Iterator[tuple[int, int, Schema]]:
    """Yield start, end in bytes and content of every line of a JSON Lines file that fits.

    An absent file has no lines; keys that the schema lacks are kept; blank lines are skipped, and
    others counted in `damage`. Raises DamagedRecord if the path is no readable file.
    """
    try:
        file = open(path, "rb", opener=open_regular)  # noqa: SIM115
    except FileNotFoundError:
        return
    except BLOCKED as error:
        raise DamagedRecord(f"{path} cannot be read ({error.strerror}): move it away") from error
    with file:
        end = number = 0
        while line := file.readline(MAX_LINE_BYTES):
            start, end, number = end, end + len(line), number + 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while rest := file.readline(MAX_LINE_BYTES):
                    end += len(rest)
                    if rest.endswith(b"\n"):
                        break
                damage.add(number, f"it has more than {MAX_LINE_BYTES:,} bytes")
            elif line.strip():
                try:
                    content = _adapter(schema).validate_json(line, strict=True, extra="allow")
                except ValidationError as error:
                    damage.add(number, first_error(error))
                else:
                    yield start, end, content


def read_typed_lines(path: Path, schema: type[Schema]) -> Iterator[Schema]:
    """Yield the lines of a JSON Lines file that fit the schema; others are one warning at its end.

    An absent file has no lines. Raises DamagedRecord if the path is no readable file.
    """
    damage = Damage(path)
    for _, _, content in scan_lines(path, schema, damage):
        yield content
    damage.report()


def read_newest_lines(
    path: Path, schema: type[Schema], damage: Damage, max_bytes: int
) -> Iterator[Schema]:
    """Yield the fitting lines of the last `max_bytes` of a JSON Lines file, newest first.

    For files of gigabytes: blocks are read as they are asked for. Lines that do not fit are
    counted in `damage` by their number from the end; an absent file has no lines. Raises
    DamagedRecord if the path is no readable file.
    """
    try:
        file = open(path, "rb", opener=open_regular)  # noqa: SIM115
    except FileNotFoundError:
        return
    except BLOCKED as error:
        raise DamagedRecord(f"{path} cannot be read ({error.strerror}): move it away") from error
    with file:
        start = file.seek(0, os.SEEK_END)
        limit = max(0, start - max_bytes)
        rest = b""  # of a line that begins in the block before
        number = 0
        while start > limit:
            size = min(TAIL_BYTES, start - limit)
            start = file.seek(start - size)
            lines = (file.read(size) + rest).split(b"\n")
            rest = lines.pop(0) if start else b""
            for line in reversed(lines):
                number += 1
                if not line.strip():
                    continue
                try:
                    yield _adapter(schema).validate_json(line, strict=True, extra="allow")
                except ValidationError as error:
                    damage.add(number, first_error(error))


def report_once(
    text: str, report: Callable[[str], None] = logger.warning, key: str | None = None
) -> None:
    """Report a text unless this process has reported it, or one with this key, already."""
    if (key or text) not in _reported:
        _reported.add(key or text)
        report(text)


def first_error(error: ValidationError) -> str:
    """The first error of a validation in one line: key, value, and what is wrong with it."""
    first = error.errors(include_url=False, include_context=False)[0]
    # a union's default has the tag ""; a key from the file may hold line ends
    key = shown(".".join(str(part) for part in first["loc"] if part != ""))[1:-1]
    if first["type"] == "json_invalid":
        return first["msg"]
    if first["type"] == "value_error":  # of a __post_init__, which names its keys
        return first["msg"].removeprefix("Value error, ")
    if first["type"] in ("missing", "unexpected_keyword_argument", "extra_forbidden"):
        return f"{key} is {'missing' if first['type'] == 'missing' else 'no key of this file'}"
    return f"{key or 'it'} is {shown(first['input'])}: {first['msg']}"


def shown(value: Any) -> str:
    """A value from a file for a message: one line, cut at MAX_SHOWN characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
