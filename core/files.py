"""Durable and atomic writes of files and folders, JSON and JSON Lines files, SHA-256.

No other module renames, replaces or opens files for writing; tests/test_writes.py lists the
exceptions.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import InputError

ROOT = Path(__file__).resolve().parent.parent  # contains configs/ and the entry scripts
TEMP_SUFFIX = ".part"
READ_BYTES = 2**20
TEMP_MAX_AGE_SECONDS = 3600.0
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, as the `opener` of `open`; a pipe would wait, a device never end.

    Raises IsADirectoryError for what is no regular file, a loop of links too, else OSError.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # ENXIO: a socket
            raise
        raise IsADirectoryError(error.errno, error.strerror, str(path)) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise IsADirectoryError(errno.EISDIR, "it is no regular file", str(path))


def read_regular(path: Path) -> bytes:
    """Read a regular file. Raises OSError as `open_regular` does."""
    with open(path, "rb", opener=open_regular) as file:
        return file.read()


def sha256_of(path: Path, on_read: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file in hexadecimal, without reading the whole file into memory.

    `on_read` is called with the bytes of each read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            if on_read is not None:
                on_read(size)
    return digest.hexdigest()


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
    fsync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes, atomically."""
    write_atomic(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write_bytes(path, text.encode())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, atomically."""
    with source.open("rb") as content:
        write_atomic(target, lambda file: shutil.copyfileobj(content, file))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, each synced into the folder that contains it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync every file and folder below a folder, and the folder itself."""
    for root, _, names in os.walk(folder):
        for name in (*names, ""):
            fsync(Path(root, name))


def rename(source: Path, target: Path) -> None:
    """Rename a synced file or folder, and sync the folders that lose and gain it."""
    source.rename(target)
    for folder in {source.parent, target.parent}:
        fsync(folder)


def move_into(folder: Path, paths: Iterable[Path]) -> None:
    """Move files or folders into a folder under their names, and sync the folders."""
    changed = {folder}
    for path in paths:
        path.rename(folder / path.name)
        changed.add(path.parent)
    for each in changed:
        fsync(each)


def sync_filesystem(folder: Path) -> None:
    """Sync all that this machine has written to the file system of a folder.

    For the many files that a library writes; one call, whatever their number.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(folder))
    finally:
        os.close(descriptor)


def publish_folder(part: Path, final: Path) -> None:
    """Sync a finished folder with all that it holds, then give it its final name.

    An older `final` is exchanged for it in one step and removed under the name `part`, which may
    remain after a kill. A file system that cannot exchange has no `final` for a moment.
    """
    sync_folder(part)
    make_folder(final.parent)
    if final.is_dir():
        if not _exchange(part, final):
            old = final.with_name(f"{final.name}.old{TEMP_SUFFIX}")
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            rename(part, final)
            part = old
        fsync(final.parent)
        if part.is_symlink():  # the older folder is elsewhere and stays there
            part.unlink()
        else:
            shutil.rmtree(part)
    else:
        rename(part, final)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders; False where kernel or file system cannot."""
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    return not renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable where its file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def is_private(status: os.stat_result) -> bool:
    """Whether only this user can write a file or folder."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


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


def append_json_line(path: Path, value: dict[str, Any], *, sync: bool = False) -> None:
    """Append an object to a JSON Lines file, as `append_line` does."""
    # texts may hold surrogates, of file names that are no UTF-8; no JSON parser has to take them
    text = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    append_line(path, json.dumps(json.loads(text)).encode(), sync=sync)  # one line for any reader


def append_line(path: Path, line: bytes, *, sync: bool = False) -> None:
    """Append a line in one write, so that processes never mix lines; with `sync` durably.

    A last line that a kill or a full disk has cut keeps a line of its own. Raises OSError.
    """
    is_new = sync and not path.exists()
    with path.open("a+b", buffering=0) as file:
        line = line + b"\n" if ends_line(file) else b"\n" + line + b"\n"
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if sync:
            os.fsync(file.fileno())
    if is_new:
        fsync(path.parent)


def ends_line(file: BinaryIO | RawIOBase) -> bool:
    """Whether a file is empty or ends with a line feed; leaves its position at the end."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
