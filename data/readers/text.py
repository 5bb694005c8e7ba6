"""Reads plain text and Markdown: one document per file; the path is the document's id."""

from collections.abc import Iterator
from typing import Any

from data.readers.base import CountingReader
from data.readers.decode import decode


def text_rows(reader: CountingReader, filepath: str) -> Iterator[tuple[int, Any]]:
    """Yield the file as a row."""
    with reader.open_file(filepath) as file:
        raw = file.read()
    text = decode(raw)
    if text is None:
        reader.drop("undecodable", filepath, raw)
        return
    yield 0, {reader.text_key: text, "id": filepath}
