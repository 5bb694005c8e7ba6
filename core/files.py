"""Atomic file writes, JSON and JSON Lines files, SHA-256."""

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import InputError

ROOT = Path(__file__).resolve().parent.parent  # contains configs/ and the entry scripts
TEMP_SUFFIX = ".part"
TEMP_MAX_AGE_SECONDS = 3600.0


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, without reading the whole file into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically: `write` fills a temporary file, which is synced and renamed.

    Readers see the old file or the new one, also after a power cut. Raises OSError; the old file
    then remains, unless only the sync of the folder failed.
    """
    # the name is unique per process: several may write the same path
    temp = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{TEMP_SUFFIX}")
    try:
        with temp.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def fsync_dir(folder: Path) -> None:
    """Make renames and removals in a folder durable, where its file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def check_folder(folder: Path, key: str, *, links: bool = False) -> None:
    """Try what a folder, which exists, must allow: renames of folders, and with `links` hard links.

    Raises InputError that names `key`, the setting of the folder.
    """
    probe = Path(tempfile.mkdtemp(prefix=".probe-", dir=folder))
    try:
        (probe / "new").mkdir()
        (probe / "new" / "file").touch()
        (probe / "new").rename(probe / "final")
        if links:
            os.link(probe / "final" / "file", probe / "link")
    except OSError as error:
        needed = "hard links and renames" if links else "renames"
        raise InputError(
            f"{key} {folder} is on a file system without {needed} ({error}): set it to another"
        ) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def remove_stale_temp_files(folder: Path) -> None:
    """Remove temporary files of killed writers: those unchanged for TEMP_MAX_AGE_SECONDS."""
    for path in folder.glob(f"*{TEMP_SUFFIX}"):
        with suppress(OSError):  # removed meanwhile, or owned by another user
            if path.is_file() and time.time() - path.stat().st_mtime > TEMP_MAX_AGE_SECONDS:
                path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that can be rebuilt; empty if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file; skip lines truncated by a kill or a full disk."""
    entries: list[dict[str, Any]] = []
    if not path.is_file():
        return entries
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                entries.append(value)
    return entries


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append an object to a JSON Lines file in one write, so that processes never mix lines."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(value) + "\n").encode())
