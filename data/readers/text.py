"""Reads files that are one document: plain text, Markdown, HTML; the path is the document's id."""

from collections.abc import Iterator
from typing import Any

from data.readers.base import CountingReader, Page
from data.readers.decode import decode


def text_rows(
    reader: CountingReader, filepath: str, row_type: type[dict[str, Any]] = dict
) -> Iterator[tuple[int, Any]]:
    """Yield the file as a row."""
    with reader.open_file(filepath) as file:
        raw = file.read()
    text = decode(raw)
    if text is None:
        reader.drop("undecodable", filepath, raw)
        return
    yield 0, row_type({reader.text_key: text, "id": filepath})


def html_rows(reader: CountingReader, filepath: str) -> Iterator[tuple[int, Any]]:
    """Yield the file as a web page."""
    yield from text_rows(reader, filepath, Page)
