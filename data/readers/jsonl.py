"""Reads JSON as its writers write it: JSON Lines, and whole arrays or objects in `.json` files.

Beyond the standard, rows may have what Python's, Java's and PowerShell's writers produce: a byte
order mark, UTF-16, NaN and Infinity (read as null), halves of surrogate pairs, control characters
in strings, integers of any size. Of a key given twice the last value counts. A blank line is no
row; a line with several values, as where files were joined without a line end, or with an array is
several rows.
"""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from data.readers.base import CountingReader
from data.readers.listing import data_suffix
from data.readers.streams import BUFFER_BYTES

MAX_VALUE_CHARACTERS = 2**28  # of a value in a `.json` file; longer ones are damage
MARKS = {  # UTF-32 first, since its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
BETWEEN_VALUES = re.compile(r"[\s,\[\]\ufeff]*")
LENIENT = json.JSONDecoder(strict=False, parse_constant=lambda name: None)


def json_rows(reader: CountingReader, filepath: str) -> Iterator[tuple[int, Any]]:
    """Yield (index, value) for every row of one file that parses; drops the other lines."""
    with reader.open_file(filepath) as stream:
        head = stream.peek(4)
        encoding = next((MARKS[mark] for mark in MARKS if head.startswith(mark)), None)
        start = head.decode(encoding or "utf-8", "ignore")
        if data_suffix(filepath) == ".json" and not has_rows_in_lines(start):
            text = io.TextIOWrapper(stream, encoding or "utf-8", "surrogatepass")
            yield from enumerate(split_values(text))
            return
        lines: Iterable[bytes] = stream
        if encoding is not None:
            text = io.TextIOWrapper(stream, encoding, "surrogatepass", newline="\n")
            lines = (line.encode("utf-8", "surrogatepass") for line in text)
        index = 0
        for line in lines:
            values = []
            try:
                values = line_values(line)
            except (ValueError, EOFError):
                reader.drop("corrupt", f"{filepath}:{index}", line)
            yield from enumerate(values, index)
            index += max(1, len(values))


def line_values(line: bytes) -> list[Any]:
    """The rows of a line; raises ValueError or EOFError if a part of it is not JSON."""
    if not line.strip():
        return []
    try:
        value = parse(line)
    except (ValueError, RecursionError):
        values = list(split_values(io.StringIO(line.decode("utf-8", "surrogatepass"))))
        if not values and len(line.strip()) > 1:  # not a bracket around the lines
            raise ValueError("brackets without a value") from None
        return values
    return value if isinstance(value, list) and value else [value]


def parse(line: bytes) -> Any:
    """Parse one row, fast where the standard allows; raises ValueError if it is not JSON."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        # surrogates may come as bytes, as from Java
        text = line.decode("utf-8", "surrogatepass").removeprefix("\ufeff")
        return LENIENT.decode(text)
    # orjson reads an integer beyond 64 bits as a float, in which ids may become equal
    return LENIENT.decode(line.decode()) if has_large_float(value) else value


def has_large_float(value: Any) -> bool:
    """Whether a parsed value has a float at any depth that may have been an integer."""
    if isinstance(value, dict):
        return any(map(has_large_float, value.values()))
    if isinstance(value, list):
        return any(map(has_large_float, value))
    return isinstance(value, float) and abs(value) >= 2**63


def has_rows_in_lines(head: str) -> bool:
    """Whether a `.json` file that begins with `head` has a whole object on its first line."""
    first_line, line_end, _ = head.lstrip("\ufeff \t\r\n").partition("\n")
    return first_line.startswith("{") and (not line_end or first_line.rstrip().endswith("}"))


def split_values(stream: io.TextIOBase) -> Iterator[Any]:
    """Yield the values of an array, or values that follow each other, as they are read.

    Raises EOFError at a value that does not end, or is not JSON.
    """
    buffer, position = "", 0
    while True:
        match = BETWEEN_VALUES.match(buffer, position)
        position = match.end() if match is not None else position
        try:
            value, position = LENIENT.raw_decode(buffer, position)
        except (ValueError, RecursionError):
            # reads as much as is held, so that a long value is parsed few times
            held = buffer[position:]
            more = stream.read(max(BUFFER_BYTES, len(held)))
            if not more and not held:
                return
            if not more or len(held) > MAX_VALUE_CHARACTERS:
                raise EOFError(f"{held[:40]!r} does not end, or is not JSON") from None
            buffer, position = held + more, 0
            continue
        yield value
