"""Base of the readers of raw documents: counts every row and reads a pinned list of files.

datatrove's readers skip a row without text after one warning, lose the rest of a file at the first
bad byte, and list the folder when a task starts. These readers count rows as datatrove's filters do
(`total`, `forwarded`, `dropped_<reason>`), so that documents in = out + dropped can be asserted.
Rows that are not documents are written to `quarantine/` with their file and row index.
"""

import base64
import gzip
import zlib
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers.base import BaseReader
from loguru import logger

from core.errors import InputError

QUARANTINE = "quarantine"
MAX_QUARANTINED_BYTES = 1_000_000  # per row


class TruncatedArchiveError(Exception):
    """A web archive that ends inside a record."""


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
