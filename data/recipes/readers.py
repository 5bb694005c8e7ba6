"""Reading raw documents, with every row accounted for.

datatrove's readers skip a row without text after one warning, lose the rest of a file at the first
bad byte, and take whatever files lie in the folder when a task starts. These read a list of files
fixed beforehand, and count under `total`, `forwarded` and `dropped_<reason>` as its filters do, so
that documents in = out + dropped can be asserted. What is no document is written to `quarantine/`,
with the place it came from.
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

PINNED = "input.json"
QUARANTINE = "quarantine"
KEPT_BYTES = 1_000_000  # of a quarantined row
SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "warc": (".warc", ".warc.gz"),
    "html": (".html", ".htm"),
}
CHARSET = re.compile(rb"""<meta[^>]+charset=["']?([\w-]+)""", re.IGNORECASE)


def is_damage(error: Exception) -> bool:
    """Whether an error means bad bytes, which a retry finds again, not a disk or network."""
    if isinstance(
        error, EOFError | zlib.error | gzip.BadGzipFile | UnicodeDecodeError | DamagedArchive
    ):
        return True
    if type(error).__module__.split(".")[0] in ("zstandard", "backports", "warcio", "pyarrow"):
        return True
    # pyarrow's, at a corrupt page: no system call gave it
    return isinstance(error, OSError) and error.errno is None


class Counted(BaseReader):
    """Mixin: counts rows, sets aside what is no document, and reads a fixed list of files."""

    files: list[str]
    quarantine: Path | None = None  # folder
    holds_html = False  # whether documents are pages, of which a recipe extracts the text

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        """Documents of files rank, rank + world_size, ...; a damaged file gives what can be read of
        it, and counts.

        Raises InputError where the system cannot read a file: that may pass, and nothing is dropped
        for it.
        """
        self.set_aside = None if self.quarantine is None else self.quarantine / f"{rank:05d}.jsonl"
        if self.set_aside is not None:
            self.set_aside.unlink(missing_ok=True)  # of a task that was killed
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
        """Count rows that yield no document, name them in the task's log and set them aside."""
        self.stat_update("total", "dropped", f"dropped_{reason}", value=rows)
        logger.warning(f"{where}: dropped as {reason}")
        if self.set_aside is None:
            return
        if isinstance(raw, bytes):
            raw = {"base64": base64.b64encode(raw[:KEPT_BYTES]).decode(), "bytes": len(raw)}
        self.set_aside.parent.mkdir(exist_ok=True)
        with self.set_aside.open("ab") as file:
            row = {"where": where, "reason": reason, "rows": rows, "raw": raw}
            file.write(orjson.dumps(row, default=repr) + b"\n")

    def get_document_from_dict(
        self, data: Any, source_file: str, id_in_file: int | str
    ) -> Document | None:
        """A row as a document, or None, counted, when it has no text."""
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


class Jsonl(Counted, JsonlReader):
    """One JSON object per line; drops only the lines that do not parse."""

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Documents of one file, decompressed by its suffix."""
        for index, row in self.rows(filepath):
            document = self.get_document_from_dict(row, filepath, index)
            if document is not None:
                yield document

    def rows(self, filepath: str) -> Iterator[tuple[int, Any]]:
        """(line number, value) of every line that parses."""
        with self.data_folder.open(filepath, "rb", compression="infer") as lines:
            for index, line in enumerate(lines):
                try:
                    yield index, orjson.loads(line)
                except orjson.JSONDecodeError:
                    self.drop("corrupt", f"{filepath}:{index}", line)


class Parquet(Counted, ParquetReader):
    """One row per document; a damaged row group costs its rows, which the file's footer counts."""

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Documents of one file."""
        import pyarrow.parquet

        with (
            self.data_folder.open(filepath, "rb") as stream,
            pyarrow.parquet.ParquetFile(stream) as file,
        ):
            if self.text_key not in file.schema_arrow.names:
                raise InputError(
                    f"{filepath} has no column {self.text_key}, but "
                    f"{', '.join(file.schema_arrow.names)}: set text_key of the source"
                )
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                try:
                    table = file.read_row_group(group)
                except Exception as error:
                    if not is_damage(error):
                        raise
                    self.drop(
                        "damaged_rows", f"{filepath}:{first}-{first + rows - 1}", str(error), rows
                    )
                    table = None
                for batch in () if table is None else table.to_batches(self.batch_size):
                    for index, row in enumerate(batch.to_pylist(), first):
                        document = self.get_document_from_dict(row, filepath, index)
                        if document is not None:
                            yield document
                    first += batch.num_rows
                if table is None:
                    first += rows


class DamagedArchive(Exception):
    """A web archive that ends too early."""


class WholeArchive:
    """A stream for warcio, which takes EOFError, as gzip raises it in a file that was cut off, for
    the end of the file.

    It hands over what there is before it complains.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.read_some = getattr(stream, "read1", stream.read)
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; raises DamagedArchive inside a compressed member that has no end."""
        try:
            data: bytes = self.read_some(size)
        except EOFError as error:
            raise DamagedArchive(str(error)) from error
        self.tail = (self.tail + data)[-4:]
        return data

    def check_end(self) -> None:
        """Raise DamagedArchive if the last record is cut: each ends with two line breaks."""
        if self.tail != b"\r\n\r\n":
            raise DamagedArchive("the last record has no end")


class Warc(Counted, WarcReader):
    """One response (or conversion) record per document; its text is HTML."""

    holds_html = True

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Documents of one archive; skips records of other types (requests, metadata)."""
        from warcio.archiveiterator import ArchiveIterator

        with self.data_folder.open(filepath, "rb", compression="infer") as stream:
            whole = WholeArchive(stream)
            for index, record in enumerate(ArchiveIterator(whole)):
                if record.rec_type not in ("response", "conversion"):
                    continue
                uri = record.rec_headers.get_header("WARC-Target-URI")
                try:
                    row = process_record(record)
                except (
                    KeyError
                ) as error:  # a record without one of the headers that the standard demands
                    self.drop("corrupt", f"{filepath}:{index}", f"{uri}: no header {error}")
                    continue
                if row is None:
                    self.drop("not_html", f"{filepath}:{index}", uri)
                    continue
                # wget writes them, as the first draft of the format did
                row["url"] = row["url"].strip("<>")
                document = self.get_document_from_dict(row, filepath, index)
                if document is not None:
                    yield document
            whole.check_end()


class Html(Counted, BaseDiskReader):
    """One page per file, whose path is its id."""

    name = "Html"
    holds_html = True

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """The page, decoded as it says or as UTF-8."""
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


def raw_files(folder: str) -> tuple[str, dict[str, list[Any]]]:
    """The kind of files that lie in a folder (local, s3://, hf://datasets/...) and, per name,
    [bytes, time of change].

    Raises InputError when the folder is missing or out of reach, holds none of SUFFIXES, or mixes
    kinds.
    """
    fix = "set data.sources.<name>.input to a folder of documents"
    try:
        place = get_datafolder(folder)
        found = place.find("", detail=True) if place.isdir("") else None
    except ImportError as error:
        raise InputError(
            f"input {folder} needs a package ({error}): pip install it, or {fix}"
        ) from error
    except OSError as error:
        raise InputError(f"input {folder} is out of reach ({error}): {fix}") from error
    if found is None:
        raise InputError(f"input folder {folder} does not exist: {fix}")
    names = {kind: [] for kind in SUFFIXES}  # type: dict[str, list[str]]
    for name in found:
        for kind, suffixes in SUFFIXES.items():
            if name.endswith(suffixes):
                names[kind].append(name)
    kinds = [kind for kind in names if names[kind]]
    if not kinds:
        every = ", ".join("*" + suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise InputError(
            f"input folder {folder} has no documents: put files of one kind there ({every})"
        )
    if len(kinds) > 1:
        raise InputError(
            f"input folder {folder} mixes {' and '.join(kinds)}: give each kind a folder and a "
            "source"
        )
    details = {name: found[name] for name in sorted(names[kinds[0]])}
    return kinds[0], {name: [info["size"], changed(info)] for name, info in details.items()}


def changed(info: dict[str, Any]) -> str:
    """What identifies a file's state: its time of change, S3's ETag, or the hub's blob."""
    return str(
        next((info[key] for key in ("mtime", "ETag", "blob_id", "created") if info.get(key)), None)
    )


def pin_files(place: Path, kind: str, files: list[str]) -> None:
    """Fix the list of a build's input files: files that arrive later belong to the next build."""
    write_json(place / PINNED, {"kind": kind, "files": files})


def open_input(source: Source, place: Path, html: bool = False) -> Counted:
    """The reader of the files pinned in `place`; raises InputError for web pages unless `html`."""
    pinned = json.loads((place / PINNED).read_text(encoding="utf-8"))
    kinds: dict[str, type[Counted]] = {
        "jsonl": Jsonl,
        "parquet": Parquet,
        "warc": Warc,
        "html": Html,
    }
    if kinds[pinned["kind"]].holds_html and not html:
        raise InputError(
            f"input folder {source.input} holds web pages: use recipe web, manuals or "
            "mathematics, which extract their text"
        )
    reader: Counted = kinds[pinned["kind"]](source.input, text_key=source.text_key)
    reader.files = pinned["files"]
    reader.quarantine = place / QUARANTINE
    return reader
