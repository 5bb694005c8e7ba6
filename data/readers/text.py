"""Reads plain text and Markdown: one document per file; the path is the document's id."""

import codecs
from collections.abc import Iterator
from typing import Any

from data.readers.base import CountingReader


def text_rows(reader: CountingReader, filepath: str) -> Iterator[tuple[int, Any]]:
    """Yield the file as a row."""
    with reader.open_file(filepath) as file:
        raw = file.read()
    try:
        text = decode_text(raw)
    except UnicodeDecodeError:
        reader.drop("undecodable", filepath, raw)
        return
    yield 0, {reader.text_key: text, "id": filepath}


def decode_text(raw: bytes) -> str:
    """Decode by the byte order mark, else as UTF-8; raises UnicodeDecodeError."""
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if is_utf16 else "utf-8")
