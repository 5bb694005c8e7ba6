"""Last words of a rank that hangs: reason and stacks, in places of which none can hold the others.

The rank may hang because its storage does, so every place is written by a thread of its own that
is waited for a short time: a file of the node's temporary folder, standard error, and last the
run's folder. Standard error may be a file of the same storage.
"""

import faulthandler
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from core.files import is_private
from train.resilience.incidents import Incidents

LOCAL_SECONDS = 1.0  # for the file of the node
OTHER_SECONDS = 1.5  # then for standard error and the run's folder


def leave_last_words(
    incidents: Incidents, heartbeats: Path, rank: int, kind: str, text: str
) -> None:
    """Write an incident and the stacks of all threads; returns after LOCAL + OTHER_SECONDS."""
    stacks = stacks_of_threads()
    word = f"{kind}: {text}"
    content = f"{word}\n".encode() + stacks
    local: list[Path] = []
    start(lambda: local.append(write_local(incidents.path.parent.name, rank, content))).join(
        LOCAL_SECONDS
    )
    where = f"in {local[0]}" if local else "not in a file: the temporary folder does not answer"
    header = f"error: {word}; stacks on {socket.gethostname()} {where}\n".encode()

    def write_run() -> None:
        incidents.write(kind, text, rank=rank)
        (heartbeats / f"stacks-{rank:05d}.txt").write_bytes(stacks)

    to_stderr = start(lambda: write_all(2, header + stacks))
    to_run = start(write_run)
    to_stderr.join(OTHER_SECONDS / 2)
    to_run.join(OTHER_SECONDS / 2)


def start(write: Callable[[], object]) -> threading.Thread:
    """Start a thread that writes and ignores a full disk or a closed pipe."""

    def work() -> None:
        with suppress(OSError):
            write()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def stacks_of_threads() -> bytes:
    """Stacks of all threads, by way of memory.

    faulthandler holds the interpreter lock while it writes: storage that hangs would hold every
    thread of this process.
    """
    try:
        descriptor = os.memfd_create("stacks")
    except OSError as error:
        return f"no stacks: {error}\n".encode()
    try:
        faulthandler.dump_traceback(descriptor, all_threads=True)
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


def write_local(run: str, rank: int, content: bytes) -> Path:
    """Write a new file into this user's folder of the node's temporary folder; return its path."""
    descriptor, path = tempfile.mkstemp(f"-{run}-rank-{rank:05d}.txt", "hang-", private_folder())
    write_all(descriptor, content)
    os.close(descriptor)
    return Path(path)


def private_folder() -> Path:
    """Create TMPDIR/falcon-mamba-UID, which only this user can write.

    Where another user has made a folder or a link of this name, return a new one of another name.
    """
    path = Path(tempfile.gettempdir()) / f"falcon-mamba-{os.getuid()}"
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode) and is_private(found):
        return path
    return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))


def write_all(descriptor: int, content: bytes) -> None:
    """Write all bytes; os.write may write fewer."""
    while content:
        content = content[os.write(descriptor, content) :]
