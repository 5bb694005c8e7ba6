"""Files that are whole or absent, JSON lines, hashes."""

import errno
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

# of the code: configs/ and the entry scripts lie there
ROOT = Path(__file__).resolve().parent.parent
TEMP_SUFFIX = ".part"  # what the name of an unfinished file ends in
TEMP_MAX_AGE_SECONDS = 3600.0


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Put a file into place at once: what `write` writes is synced under another name, then
    renamed.

    A reader sees the old file or the new one, also after a power cut. Raises OSError, and leaves
    the old file unless it was the folder that could not be synced.
    """
    # writers may be many
    part = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{TEMP_SUFFIX}")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    """write_with for text, as UTF-8."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """write_with for a value that JSON can write."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def fsync_dir(folder: Path) -> None:
    """Make renames and removals in a folder survive power loss, if its file system allows it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync no folder
            raise
    finally:
        os.close(descriptor)


def remove_stale_temp_files(folder: Path) -> None:
    """Remove what killed writers left in a folder: parts that nobody has written to for an hour."""
    for part in folder.glob(f"*{TEMP_SUFFIX}"):
        with suppress(OSError):  # it has gone, or is another user's
            if part.is_file() and time.time() - part.stat().st_mtime > TEMP_MAX_AGE_SECONDS:
                part.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that can be made anew; empty when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file; skip lines cut short by a kill or a full disk."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) else []
    return found


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append an object to a JSON Lines file in one write: lines of several processes stay whole."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(value) + "\n").encode())
