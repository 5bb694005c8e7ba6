"""Reads web pages: records of WARC archives, and HTML files."""

import re
from collections.abc import Iterator
from typing import Any

from datatrove.pipeline.readers.warc import process_record

from data.readers.base import CountingReader, Page, TruncatedArchiveError

CHARSET = re.compile(rb"""<meta[^>]+charset=["']?([\w-]+)""", re.IGNORECASE)


class TruncationCheckingStream:
    """A stream for warcio that raises TruncatedArchiveError after the last readable byte.

    gzip raises EOFError in a truncated file, which warcio mistakes for the end of the archive.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.read_chunk = getattr(stream, "read1", stream.read)
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; raises TruncatedArchiveError if a gzip member has no end."""
        try:
            data: bytes = self.read_chunk(size)
        except EOFError as error:
            raise TruncatedArchiveError(str(error)) from error
        self.tail = (self.tail + data)[-4:]
        return data

    def check_end(self) -> None:
        """Raise TruncatedArchiveError unless the last record ends with two line breaks."""
        if self.tail != b"\r\n\r\n":
            raise TruncatedArchiveError("the last record has no end")


def warc_rows(reader: CountingReader, filepath: str) -> Iterator[tuple[int, Any]]:
    """Yield the response (or conversion) records of one archive; skips requests and metadata."""
    from warcio.archiveiterator import ArchiveIterator

    with reader.open_file(filepath) as stream:
        checked = TruncationCheckingStream(stream)
        for index, record in enumerate(ArchiveIterator(checked)):
            if record.rec_type not in ("response", "conversion"):
                continue
            uri = record.rec_headers.get_header("WARC-Target-URI")
            try:
                row = process_record(record)
            except KeyError as error:  # a header that the standard requires is missing
                reader.drop("corrupt", f"{filepath}:{index}", f"{uri}: no header {error}")
                continue
            if row is None:
                reader.drop("not_html", f"{filepath}:{index}", uri)
                continue
            # wget and the format's first draft put URLs in angle brackets
            row["url"] = row["url"].strip("<>")
            row[reader.text_key] = row.pop("text")
            yield index, Page(row)
        checked.check_end()


def html_rows(reader: CountingReader, filepath: str) -> Iterator[tuple[int, Any]]:
    """Yield the page, decoded by its declared charset or as UTF-8; its id is the path."""
    with reader.open_file(filepath) as file:
        raw = file.read()
    declared = CHARSET.search(raw[:2048])
    try:
        text = raw.decode(declared[1].decode() if declared else "utf-8")
    except (UnicodeDecodeError, LookupError):
        reader.drop("undecodable", filepath, raw)
        return
    yield 0, Page({reader.text_key: text, "id": filepath})
