"""Lists the raw files of a source, pins the list for a build, and opens their reader."""

import json
from pathlib import Path
from typing import Any

from datatrove.io import get_datafolder

from core.errors import InputError
from core.files import write_json
from data.config import Source
from data.readers.base import QUARANTINE, CountingReader
from data.readers.jsonl import Jsonl
from data.readers.tables import Parquet
from data.readers.web import Html, Warc

INPUT_LIST = "input.json"
SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "warc": (".warc", ".warc.gz"),
    "html": (".html", ".htm"),
}


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
