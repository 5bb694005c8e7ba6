"""Reads the files of a source, each by its kind, as rows and as documents."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline

from core.errors import InputError
from data.config import Source
from data.readers.base import QUARANTINE, CountingReader
from data.readers.jsonl import json_rows
from data.readers.listing import kind_of, read_pinned
from data.readers.tables import parquet_rows
from data.readers.text import html_rows, text_rows
from data.readers.web import warc_rows

Rows = Callable[[CountingReader, str], Iterator[tuple[int, Any]]]
READERS: dict[str, Rows] = {
    "jsonl": json_rows,
    "parquet": parquet_rows,
    "warc": warc_rows,
    "html": html_rows,
    "text": text_rows,
}
PAGE_KINDS = ("html", "warc")


class DocumentReader(CountingReader):
    """Reads files of any kind: one document per row, record or page."""

    name = ""

    def __init__(self, folder: str, files: list[str], **options: Any) -> None:
        self.kinds = sorted({kind for name in files if (kind := kind_of(name))})
        self.name = self.name or " + ".join(map(str.capitalize, self.kinds))
        super().__init__(folder, files, **options)

    @property
    def has_pages(self) -> bool:
        """Whether there are web pages, whose text a recipe has to extract."""
        return any(kind in self.kinds for kind in PAGE_KINDS)

    def rows(self, filepath: str) -> Iterator[tuple[int, Any]]:
        """Yield (index, row) for every row of a file that can be read; the others are dropped."""
        kind = kind_of(filepath)
        assert kind is not None, filepath
        yield from READERS[kind](self, filepath)

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Yield the documents of one file."""
        for index, row in self.rows(filepath):
            document = self.get_document_from_dict(row, filepath, index)
            if document is not None:
                yield document


def open_input(
    source: Source,
    folder: Path,
    *,
    allow_html: bool = False,
    reader_class: type[DocumentReader] = DocumentReader,
    columns: tuple[str, ...] | None = (),
    instead_of_text: tuple[str, ...] = (),
) -> DocumentReader:
    """Open a reader of the files pinned in `folder`; `columns` as in CountingReader.

    Raises InputError if some are web pages, unless `allow_html`.
    """
    reader = reader_class(
        source.input,
        read_pinned(folder),
        text_key=source.text_key,
        quarantine=folder / QUARANTINE,
        columns=columns,
        instead_of_text=instead_of_text,
    )
    if reader.has_pages and not allow_html:
        pages = [name for name in reader.files if kind_of(name) in PAGE_KINDS]
        raise InputError(
            f"input folder {source.input} has web pages ({len(pages)} files, first {pages[0]}): "
            "use recipe web, manuals or mathematics, which extract their text, or move them away"
        )
    return reader
