"""Lists the files of a source's input: which are read, and as what; pins the list for a build.

Every file of the folder is read or counted as ignored, with the reason and the first names.
"""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired

from datatrove.io import DataFolder, get_datafolder
from typing_extensions import TypedDict

from core.errors import InputError
from core.files import write_json
from core.ranges import Whole
from core.records import read_required

INPUT_LIST = "input.json"
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".txt": "text",
    ".md": "text",
}
COMPRESSION = (".gz", ".zst", ".bz2", ".xz")
MAX_DOCUMENT_BYTES = 2**30  # of a file that is one document, which is held in memory
MAX_REASONS = 20
MAX_EXAMPLES = 3  # per reason

Files = dict[str, list[Any]]  # [bytes, version] by name


@dataclass(frozen=True)
class Listing:
    """Files of an input folder."""

    kind: str  # such as "jsonl" or "html+text"
    files: Files  # that are read
    # files that are not read: reason (mostly the suffix) -> number and first names
    ignored: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the files that are read, by name."""
        return {name: size for name, (size, _) in self.files.items()}

    def counts(self) -> dict[str, Any]:
        """What the report says of the files."""
        return {"kind": self.kind, "read": len(self.files), "ignored": self.ignored}


def data_suffix(name: str) -> str:
    """Lower-case suffix of a file without that of its compression, such as `.jsonl`."""
    path = PurePosixPath(name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSION else path).suffix


def suffixes_of(name: str) -> str:
    """Lower-case suffix of a file with that of its compression, such as `.jsonl.gz`."""
    suffix = PurePosixPath(name.lower()).suffix
    return data_suffix(name) + suffix if suffix in COMPRESSION else suffix


def kind_of(name: str) -> str | None:
    """How a file is read: a value of KINDS, or None if its suffix is none of them."""
    kind = KINDS.get(data_suffix(name))
    # Parquet compresses its columns, and must be read at any position
    return None if kind == "parquet" and suffixes_of(name) != ".parquet" else kind


def find_files(folder: str) -> tuple[DataFolder, dict[str, dict[str, Any]]]:
    """The folder and what is known of every file in it, by name.

    The folder may be local or a URL (s3://, hf://datasets/...). Raises InputError if it is missing
    or unreachable.
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
    return data_folder, files


def list_raw_files(folder: str) -> Listing:
    """List a folder's files.

    Raises InputError if it is missing or unreachable, if no file is read, or if a document is
    larger than MAX_DOCUMENT_BYTES.
    """
    data_folder, found = find_files(folder)
    reasons = {name: why_ignored(data_folder, name, info) for name, info in found.items()}
    names = sorted(name for name, reason in reasons.items() if reason is None)
    ignored = count_ignored({name: reason for name, reason in reasons.items() if reason})
    if not names:
        patterns = ", ".join("*" + suffix for suffix in KINDS)
        suffix = f" ({describe_ignored(ignored)})" if ignored else ""
        raise InputError(
            f"input folder {folder} has no documents{suffix}: put files there that can be read "
            f"({patterns}, also with {', '.join(COMPRESSION)})"
        )
    for name in names:
        size = found[name]["size"]
        if kind_of(name) in ("text", "html") and size > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{name} in {folder} has {size:,} bytes and would be one document: split it into "
                "its documents, or write them as lines of a .jsonl file"
            )
    kinds = sorted({kind for name in names if (kind := kind_of(name))})
    files = {name: [found[name]["size"], file_version(found[name])] for name in names}
    assert len(found) == len(files) + sum(each["files"] for each in ignored.values())
    return Listing("+".join(kinds), files, ignored)


def why_ignored(folder: DataFolder, name: str, info: dict[str, Any]) -> str | None:
    """Why a file is not read: hidden, no file, empty, readme, or its suffix; None if it is."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return "hidden"  # such as .DS_Store, ._a.jsonl, .cache/
    if info["type"] != "file" and not folder.isfile(name):
        return "not a file"  # a link to a folder or to nothing, a pipe
    if kind_of(name) is None:
        return suffixes_of(name) or "no suffix"
    if not info["size"]:
        return "empty"
    # it describes the folder, as on the Hugging Face hub
    is_readme = len(path.parts) == 1 and name.lower().startswith("readme.")
    return "readme" if is_readme and kind_of(name) == "text" else None


def count_ignored(reasons: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Number of files and first names by reason; the size does not grow with the folder."""
    counted: dict[str, dict[str, Any]] = {}
    for name in sorted(reasons):
        reason = reasons[name]
        if reason not in counted and len(counted) >= MAX_REASONS:
            reason = "other suffixes"
        entry = counted.setdefault(reason, {"files": 0, "examples": []})
        entry["files"] += 1
        if len(entry["examples"]) < MAX_EXAMPLES:
            entry["examples"].append(name)
    return counted


def describe_ignored(ignored: dict[str, dict[str, Any]]) -> str:
    """`.csv 2 (a.csv, b.csv), hidden 1 (.DS_Store)`, most frequent first."""
    ranked = sorted(ignored.items(), key=lambda item: (-item[1]["files"], item[0]))
    return ", ".join(
        f"{reason} {entry['files']:,} ({', '.join(entry['examples'])}"
        f"{', ...' if entry['files'] > len(entry['examples']) else ''})"
        for reason, entry in ranked
    )


def file_version(info: dict[str, Any]) -> str:
    """Identify a file's content by its modification time, S3 ETag or Hub blob id."""
    return str(
        next((info[key] for key in ("mtime", "ETag", "blob_id", "created") if info.get(key)), None)
    )


def pin_files(folder: Path, listing: Listing) -> None:
    """Write the list of a build's input files; files added later belong to the next build."""
    content = {"kind": listing.kind, "files": list(listing.files)}
    write_json(folder / INPUT_LIST, {**content, "bytes": sum(listing.sizes.values())})


class PinnedList(TypedDict):
    """Content of input.json."""

    kind: str
    files: list[str]
    bytes: NotRequired[Whole]  # of all files; absent before version 0.3


def read_pinned_list(folder: Path) -> PinnedList:
    """The list that `pin_files` wrote. Raises InputError if it is damaged."""
    fix = f"remove {folder} and prepare the data again"
    return read_required(folder / INPUT_LIST, PinnedList, fix)


def read_pinned(folder: Path) -> list[str]:
    """Names of the files that `pin_files` wrote."""
    return read_pinned_list(folder)["files"]
