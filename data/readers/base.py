"""Base of the reader of raw documents: counts every row and reads a pinned list of files.

datatrove's readers skip a row without text after one warning, lose the rest of a file at the first
bad byte, and list the folder when a task starts. This reader counts rows as datatrove's filters do
(`total`, `forwarded`, `dropped_<reason>`), so that documents in = out + dropped can be asserted.
Rows that are not documents are written to `quarantine/` with their file and row index.
"""

import base64
import gzip
import io
import json
import lzma
import zlib
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers.base import BaseDiskReader
from loguru import logger

from core.errors import InputError
from data.readers.normalize import join_surrogates, normalize
from data.readers.streams import ZstdFrames, open_stream

QUARANTINE = "quarantine"
MAX_QUARANTINED_BYTES = 1_000_000  # per row
# metadata that the reader sets: whether a document is from the web, and whether its text is HTML
IS_PAGE, IS_HTML = "is_page", "is_html"


class TruncatedArchiveError(Exception):
    """A web archive that ends inside a record."""


class Page(dict[str, Any]):
    """A web page, whose text is HTML that a recipe has to extract, unless `is_html` is False."""


def is_damage(error: Exception) -> bool:
    """Whether an error means damaged data, which a retry would meet again, not a disk failure."""
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile | lzma.LZMAError):
        return True
    if isinstance(error, UnicodeDecodeError | TruncatedArchiveError):
        return True
    if type(error).__module__.split(".")[0] in ("zstandard", "backports", "warcio", "pyarrow"):
        return True
    # pyarrow raises OSError without errno at a corrupt page
    return isinstance(error, OSError) and error.errno is None


class CountingReader(BaseDiskReader):
    """Counts rows, quarantines rows that are not documents, and reads a pinned list of files.

    `columns`: what is read of a Parquet file besides `text_key`, None for all. `instead_of_text`:
    columns of which one suffices where `text_key` is missing.
    """

    def __init__(
        self,
        folder: str,
        files: list[str],
        *,
        text_key: str = "text",
        quarantine: Path | None = None,
        columns: tuple[str, ...] | None = (),
        instead_of_text: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder, text_key=text_key)
        self.files = files
        self.quarantine = quarantine  # folder
        self.quarantine_file: Path | None = None
        self.columns = columns
        self.instead_of_text = instead_of_text

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

    def open_file(self, filepath: str) -> io.BufferedReader:
        """Open a file for reading, decompressed by its suffix."""
        is_zstd = filepath.lower().endswith(".zst")
        compression = None if is_zstd else "infer"
        stream = self.data_folder.open(filepath, "rb", compression=compression)
        return open_stream(ZstdFrames(stream) if is_zstd else stream)

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
        with self.quarantine_file.open("a", encoding="utf-8") as file:
            row = {"where": where, "reason": reason, "rows": rows, "raw": raw}
            # orjson refuses lone surrogates and large integers, which a dropped row may have
            file.write(json.dumps(row, default=repr) + "\n")

    def get_document_from_dict(
        self, data: Any, source_file: str, id_in_file: int | str
    ) -> Document | None:
        """Make a document of a row and count it; without text, drop the row and return None."""
        where = f"{source_file}:{id_in_file}"
        text = data.get(self.text_key, "") if isinstance(data, dict) else data
        if not isinstance(data, dict) or not isinstance(text, str | None):
            self.drop("corrupt", where, data)
            return None
        if not (text := normalize(text or "")):
            self.drop("empty", where, data)
            return None
        is_page = isinstance(data, Page)
        is_html = is_page and data.get(IS_HTML, True)
        data = {**data, self.text_key: text}
        data.pop("media", None)  # not datatrove's media, which other writers do not know
        if data.get(self.id_key) is None:
            data[self.id_key] = f"{source_file}/{id_in_file}"
        document = super().get_document_from_dict(data, source_file, id_in_file)
        document.id = join_surrogates(str(document.id))
        document.metadata |= {IS_PAGE: is_page, IS_HTML: is_html}
        self.stat_update("total", "forwarded")
        self.update_doc_stats(document)
        return document
