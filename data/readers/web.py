"""Reads web pages: records of WARC archives, and HTML files."""

import re
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.readers import WarcReader
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.readers.warc import process_record

from data.readers.base import CountingReader, TruncatedArchiveError

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


class Warc(CountingReader, WarcReader):
    """One response (or conversion) record per document, whose text is HTML."""

    is_html = True

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Yield the documents of one archive; skips other records (requests, metadata)."""
        from warcio.archiveiterator import ArchiveIterator

        with self.data_folder.open(filepath, "rb", compression="infer") as stream:
            checked = TruncationCheckingStream(stream)
            for index, record in enumerate(ArchiveIterator(checked)):
                if record.rec_type not in ("response", "conversion"):
                    continue
                uri = record.rec_headers.get_header("WARC-Target-URI")
                try:
                    row = process_record(record)
                except KeyError as error:  # a header that the standard requires is missing
                    self.drop("corrupt", f"{filepath}:{index}", f"{uri}: no header {error}")
                    continue
                if row is None:
                    self.drop("not_html", f"{filepath}:{index}", uri)
                    continue
                # wget and the format's first draft put URLs in angle brackets
                row["url"] = row["url"].strip("<>")
                document = self.get_document_from_dict(row, filepath, index)
                if document is not None:
                    yield document
            checked.check_end()


class Html(CountingReader, BaseDiskReader):
    """One page per file; the path is the document's id."""

    name = "Html"
    is_html = True

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Yield the page, decoded by its declared charset or as UTF-8."""
        with self.data_folder.open(filepath, "rb") as file:
            raw = file.read()
        declared = CHARSET.search(raw[:2048])
        try:
            text = raw.decode(declared[1].decode() if declared else "utf-8")
        except (UnicodeDecodeError, LookupError):
            self.drop("undecodable", filepath, raw)
            return
        document = self.get_document_from_dict({self.text_key: text, "id": filepath}, filepath, 0)
        if document is not None:
            yield document
