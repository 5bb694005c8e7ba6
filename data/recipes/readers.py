"""Reading raw documents, with every row accounted for.

datatrove's readers skip a row without text after one warning, lose the rest of a file at the first bad byte, and take
whatever files lie in the folder when a task starts. These read a list of files fixed beforehand, and count under
`total`, `forwarded` and `dropped_<reason>` as its filters do, so that documents in = out + dropped can be asserted.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.readers import JsonlReader, ParquetReader, WarcReader
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.readers.warc import process_record
from loguru import logger

from data.config import InputError

HOST = "host"
PINNED = "input.json"
SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "warc": (".warc", ".warc.gz"),
}


class Counted(BaseReader):
    """Mixin: counts rows, refuses what is no document, and reads a fixed list of files."""

    files: list[str]

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Documents of files rank, rank + world_size, ...; raises InputError at a file that cannot be read through."""
        for name in self.files[rank::world_size]:
            try:
                yield from self.read_files_shard([name])
            except (EOFError, OSError, ValueError, zlib.error) as error:
                raise InputError(f"{name} is damaged ({error}): fetch it again or take it out of the input") from error

    def drop(self, reason: str, where: str) -> None:
        """Count a row that yields no document and name it in the task's log."""
        self.stat_update("total", "dropped", f"dropped_{reason}")
        logger.warning(f"{where}: dropped as {reason}")

    def get_document_from_dict(self, data: Any, source_file: str, id_in_file: int | str) -> Document | None:
        """A row as a document, or None, counted, when it has no text."""
        where = f"{source_file}:{id_in_file}"
        if not isinstance(data, dict) or not isinstance(data.get(self.text_key, ""), str | None):
            self.drop("corrupt", where)
            return None
        if not data.get(self.text_key):
            self.drop("empty", where)
            return None
        document = super().get_document_from_dict(data, source_file, id_in_file)
        self.stat_update("total", "forwarded")
        self.update_doc_stats(document)
        return document


class Jsonl(Counted, JsonlReader):
    """One JSON object per line; a line that does not parse costs that line, not the rest of the file."""

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Documents of one file, decompressed by its suffix."""
        with self.data_folder.open(filepath, "rb", compression="infer") as lines:
            for index, line in enumerate(lines):
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError:
                    self.drop("corrupt", f"{filepath}:{index}")
                    continue
                document = self.get_document_from_dict(row, filepath, index)
                if document is not None:
                    yield document


class Parquet(Counted, ParquetReader):
    """One row per document."""


class Warc(Counted, WarcReader):
    """One response (or conversion) record per document; its text is HTML."""

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Documents of one archive; records of other types (requests, metadata) are no documents."""
        from warcio.archiveiterator import ArchiveIterator

        with self.data_folder.open(filepath, "rb", compression="infer") as stream:
            for index, record in enumerate(ArchiveIterator(stream)):
                if record.rec_type not in ("response", "conversion"):
                    continue
                row = process_record(record)
                if row is None:
                    self.drop("not_html", f"{filepath}:{index}")
                    continue
                document = self.get_document_from_dict(row, filepath, index)
                if document is not None:
                    yield document


class Rows(Counted):
    """Documents made by a function instead of read from files; every task makes all and keeps its share."""

    name = "Rows"

    def __init__(self, rows: Callable[[], Iterable[dict[str, Any]]]) -> None:
        super().__init__()
        self.rows = rows

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents rank, rank + world_size, ..."""
        for index, row in enumerate(islice(self.rows(), rank, None, world_size)):
            document = self.get_document_from_dict(row, HOST, index)
            if document is not None:
                yield document


def raw_files(folder: str) -> tuple[str, dict[str, list[Any]]]:
    """The kind of files that lie in a folder and, per name, [bytes, time of change].

    Raises InputError when the folder is missing, holds none of SUFFIXES, or mixes kinds.
    """
    place = get_datafolder(folder)
    if not place.isdir(""):
        raise InputError(
            f"input folder {folder} does not exist: set data.sources.<name>.input to a folder of documents"
        )
    names = {kind: [] for kind in SUFFIXES}  # type: dict[str, list[str]]
    for name in place.list_files(recursive=True):
        for kind, suffixes in SUFFIXES.items():
            if name.endswith(suffixes):
                names[kind].append(name)
    kinds = [kind for kind in names if names[kind]]
    if not kinds:
        every = ", ".join("*" + suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise InputError(f"input folder {folder} has no documents: put files of one kind there ({every})")
    if len(kinds) > 1:
        raise InputError(f"input folder {folder} mixes {' and '.join(kinds)}: give each kind a folder and a source")
    details = {name: place.info(name) for name in sorted(names[kinds[0]])}
    return kinds[0], {name: [info["size"], str(info.get("mtime", info.get("ETag")))] for name, info in details.items()}


def pin_files(place: Path, kind: str, files: list[str]) -> None:
    """Fix the list of input files of a build: a file that arrives while tasks run belongs to the next build."""
    (place / PINNED).write_text(json.dumps({"kind": kind, "files": files}), encoding="utf-8")


def open_input(folder: str, place: Path, html: bool = False) -> Counted:
    """The reader of the files pinned in `place`; web archives only for a recipe that extracts text from `html`."""
    pinned = json.loads((place / PINNED).read_text(encoding="utf-8"))
    if pinned["kind"] == "warc" and not html:
        raise InputError(f"input folder {folder} holds web archives: use recipe web, which extracts their text")
    reader: Counted = {"jsonl": Jsonl, "parquet": Parquet, "warc": Warc}[pinned["kind"]](folder)
    reader.files = pinned["files"]
    return reader
