"""Readers of raw documents that count every row and read a pinned list of files.

datatrove's readers skip a row without text after one warning, lose the rest of a file at the first
bad byte, and list the folder when a task starts. These readers count rows as datatrove's filters do
(`total`, `forwarded`, `dropped_<reason>`), so that documents in = out + dropped can be asserted.
Rows that are not documents are written to `quarantine/` with their file and row index.
"""

import base64
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.readers import JsonlReader, ParquetReader, WarcReader
from datatrove.pipeline.readers.base import BaseDiskReader, BaseReader
from datatrove.pipeline.readers.warc import process_record
from loguru import logger

from core.errors import InputError
from core.files import write_json
from data.config import Source

INPUT_LIST = "input.json"
QUARANTINE = "quarantine"
MAX_QUARANTINED_BYTES = 1_000_000  # per row
SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "warc": (".warc", ".warc.gz"),
    "html": (".html", ".htm"),
}
CHARSET = re.compile(rb"""<meta[^>]+charset=["']?([\w-]+)""", re.IGNORECASE)


def is_damage(error: Exception) -> bool:
    """Whether an error means damaged data, which a retry would meet again, not a disk failure."""
    if isinstance(
        error, EOFError | zlib.error | gzip.BadGzipFile | UnicodeDecodeError | TruncatedArchiveError
    ):
        return True
    if type(error).__module__.split(".")[0] in ("zstandard", "backports", "warcio", "pyarrow"):
        return True
    # pyarrow raises OSError without errno at a corrupt page
    return isinstance(error, OSError) and error.errno is None


class CountingReader(BaseReader):
    """Mixin: counts rows, quarantines rows that are not documents, and reads a pinned file list."""

    files: list[str]
    quarantine: Path | None = None  # folder
    is_html = False  # whether documents are HTML pages, whose text a recipe has to extract

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        """Yield the documents of files rank, rank + world_size, ...

        A damaged file yields its readable documents and counts as one dropped row. Raises
        InputError if a disk or network error prevents reading, since a retry may succeed.
        """
        self.quarantine_file = self.quarantine and self.quarantine / f"{rank:05d}.jsonl"
        if self.quarantine_file is not None:
            self.quarantine_file.unlink(missing_ok=True)  # may be there from a killed task
        for name in self.files[rank::world_size]:
            try:
                yield from self.read_files_shard([name])
            except InputError:
                raise
            except Exception as error:
                if not is_damage(error):
                    raise InputError(
                        f"{name} cannot be read ({type(error).__name__}: {error}): try again"
                    ) from error
                self.drop("damaged_file", name, f"the rest of the file is lost: {error}")

    def drop(self, reason: str, where: str, raw: Any = None, rows: int = 1) -> None:
        """Count rows that yield no document, log them and write them to the quarantine file."""
        self.stat_update("total", "dropped", f"dropped_{reason}", value=rows)
        logger.warning(f"{where}: dropped as {reason}")
        if self.quarantine_file is None:
            return
        if isinstance(raw, bytes):
            encoded = base64.b64encode(raw[:MAX_QUARANTINED_BYTES]).decode()
            raw = {"base64": encoded, "bytes": len(raw)}
        self.quarantine_file.parent.mkdir(exist_ok=True)
        with self.quarantine_file.open("ab") as file:
            row = {"where": where, "reason": reason, "rows": rows, "raw": raw}
            file.write(orjson.dumps(row, default=repr) + b"\n")

    def get_document_from_dict(
        self, data: Any, source_file: str, id_in_file: int | str
    ) -> Document | None:
        """Make a document of a row and count it; without text, drop the row and return None."""
        where = f"{source_file}:{id_in_file}"
        if not isinstance(data, dict) or not isinstance(data.get(self.text_key, ""), str | None):
            self.drop("corrupt", where, data)
            return None
        if not data.get(self.text_key):
            self.drop("empty", where, data)
            return None
        document = super().get_document_from_dict(data, source_file, id_in_file)
        self.stat_update("total", "forwarded")
        self.update_doc_stats(document)
        return document


class Jsonl(CountingReader, JsonlReader):
    """One JSON object per line; drops only the lines that do not parse."""

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Yield the documents of one file, decompressed by its suffix."""
        for index, row in self.rows(filepath):
            document = self.get_document_from_dict(row, filepath, index)
            if document is not None:
                yield document

    def rows(self, filepath: str) -> Iterator[tuple[int, Any]]:
        """Yield (line index, value) for every line that parses."""
        with self.data_folder.open(filepath, "rb", compression="infer") as lines:
            for index, line in enumerate(lines):
                try:
                    yield index, orjson.loads(line)
                except orjson.JSONDecodeError:
                    self.drop("corrupt", f"{filepath}:{index}", line)


class Parquet(CountingReader, ParquetReader):
    """One row per document; drops the rows of a damaged row group, which the footer counts."""

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Yield the documents of one file."""
        import pyarrow.parquet

        with (
            self.data_folder.open(filepath, "rb") as stream,
            pyarrow.parquet.ParquetFile(stream) as file,
        ):
            if self.text_key not in file.schema_arrow.names:
                raise InputError(
                    f"{filepath} has no column {self.text_key}, but "
                    f"{', '.join(file.schema_arrow.names)}: set data.sources.<name>.text_key"
                )
            first = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                try:
                    table = file.read_row_group(group)
                except Exception as error:
                    if not is_damage(error):
                        raise
                    where = f"{filepath}:{first}-{first + num_rows - 1}"
                    self.drop("damaged_rows", where, str(error), num_rows)
                    first += num_rows
                    continue
                for batch in table.to_batches(self.batch_size):
                    for index, row in enumerate(batch.to_pylist(), first):
                        document = self.get_document_from_dict(row, filepath, index)
                        if document is not None:
                            yield document
                    first += batch.num_rows


class TruncatedArchiveError(Exception):
    """A web archive that ends inside a record."""


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


def list_raw_files(folder: str) -> tuple[str, dict[str, list[Any]]]:
    """Return the kind of a folder's files and {name: [bytes, version]}.

    The folder may be local or a URL (s3://, hf://datasets/...). Raises InputError if it is missing
    or unreachable, has no file with one of SUFFIXES, or mixes kinds.
    """
    fix = "set data.sources.<name>.input to a folder of documents"
    try:
        data_folder = get_datafolder(folder)
        files = data_folder.find("", detail=True) if data_folder.isdir("") else None
    except ImportError as error:
        raise InputError(
            f"input {folder} needs a package ({error}): pip install it, or {fix}"
        ) from error
    except OSError as error:
        raise InputError(f"input {folder} cannot be reached ({error}): {fix}") from error
    if files is None:
        raise InputError(f"input folder {folder} does not exist: {fix}")
    names: dict[str, list[str]] = {kind: [] for kind in SUFFIXES}
    for name in files:
        for kind, suffixes in SUFFIXES.items():
            if name.endswith(suffixes):
                names[kind].append(name)
    kinds = [kind for kind in names if names[kind]]
    if not kinds:
        patterns = ", ".join("*" + suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise InputError(
            f"input folder {folder} has no documents: put files of one kind there ({patterns})"
        )
    if len(kinds) > 1:
        raise InputError(
            f"input folder {folder} mixes {' and '.join(kinds)}: give each kind its own "
            "folder and source"
        )
    kind = kinds[0]
    return kind, {
        name: [files[name]["size"], file_version(files[name])] for name in sorted(names[kind])
    }


def file_version(info: dict[str, Any]) -> str:
    """Identify a file's content by its modification time, S3 ETag or Hub blob id."""
    return str(
        next((info[key] for key in ("mtime", "ETag", "blob_id", "created") if info.get(key)), None)
    )


def pin_files(folder: Path, kind: str, files: list[str]) -> None:
    """Write the list of a build's input files; files added later belong to the next build."""
    write_json(folder / INPUT_LIST, {"kind": kind, "files": files})


def open_input(source: Source, folder: Path, allow_html: bool = False) -> CountingReader:
    """Open a reader of the files pinned in `folder`.

    Raises InputError if they are HTML pages, unless `allow_html`.
    """
    pinned = json.loads((folder / INPUT_LIST).read_text(encoding="utf-8"))
    readers: dict[str, type[CountingReader]] = {
        "jsonl": Jsonl,
        "parquet": Parquet,
        "warc": Warc,
        "html": Html,
    }
    reader_class = readers[pinned["kind"]]
    if reader_class.is_html and not allow_html:
        raise InputError(
            f"input folder {source.input} has web pages: use recipe web, manuals or mathematics, "
            "which extract their text"
        )
    reader: CountingReader = reader_class(source.input, text_key=source.text_key)
    reader.files = pinned["files"]
    reader.quarantine = folder / QUARANTINE
    return reader
