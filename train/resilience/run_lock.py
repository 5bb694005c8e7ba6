"""Lock a run's folder for one job, with a lock file that the holder renews.

A second job refuses to start while the holder lives. On the same machine it checks the holder's
process. Elsewhere it watches for LOCK_TIMEOUT_SECONDS whether the file's time changes: only changes
count, so clocks that differ or jump do not matter.

A job never checks a lock and then replaces it unguarded, however slow the file system is. The lock
of an ended job is replaced or removed only by the job whose hard link got the name of a claim on
it; the lock's content is unique and names the claim. What the files then contain decides, not what
a call returned: NFS may report an error of a link that it has made.
"""

import hashlib
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from core.errors import InputError
from core.files import TEMP_SUFFIX
from core.run import RunFiles

LOCK_TIMEOUT_SECONDS = 60.0  # longer than network file systems cache attributes
RENEW_SECONDS = 10.0


def machine() -> str:
    """Identify this machine, its boot and its PID namespace. Raises InputError without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError as error:
        raise InputError(f"a run's lock needs /proc ({error}): mount it") from error
    return f"{socket.gethostname()} {boot} {namespace}"


def process_start(pid: int) -> str | None:
    """Return a process's start time in kernel ticks, or None if it has exited or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class RunLock:
    """The lock of a run folder, held by its first rank."""

    def __init__(self, folder: Path, seconds: float = LOCK_TIMEOUT_SECONDS) -> None:
        self.path = RunFiles(folder).lock
        self.seconds = seconds
        self.content = b""
        self.descriptor = -1

    def acquire(self) -> None:
        """Acquire the lock. Raises InputError, and writes nothing, while another job holds it.

        Takes over from a job that has ended: at once on the same machine, elsewhere after
        `seconds`.
        """
        owner = {"machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())}
        self.content = (json.dumps({**owner, "id": uuid.uuid4().hex}) + "\n").encode()
        temporary = self._part("new", self.path, self.content)
        try:
            temporary.write_bytes(self.content)
            while not (self._link(temporary, self.path) and self._open()):
                self._replace(self.path, temporary)
        finally:
            temporary.unlink(missing_ok=True)
        self._remove_parts_of_ended_jobs()

    def renew(self) -> bool:
        """Touch the lock file, which needs no disk space; False if another job has the lock."""
        try:
            if self.path.read_bytes() != self.content:
                return False
            os.utime(self.descriptor)
        except FileNotFoundError:
            return False
        except OSError:  # a hanging or read-only file system does not mean another holder
            return True
        return True

    def release(self) -> None:
        """Release the lock, unless another job has taken it."""
        if self.descriptor < 0:
            return
        claim = self._part("claim", self.path, self.content)
        with suppress(OSError):  # what remains is the lock of an ended job
            # From the descriptor, since the path may already be another job's lock. With src_dir_fd
            # os.link follows the symbolic link; it fails if another job claims or has the lock.
            with suppress(FileExistsError, FileNotFoundError):
                os.link(f"/proc/self/fd/{self.descriptor}", claim, src_dir_fd=self.descriptor)
            if self._contains(claim, self.content):
                if self._contains(self.path, self.content):
                    self.path.unlink()
                claim.unlink()
        os.close(self.descriptor)
        self.descriptor = -1

    def _open(self) -> bool:
        """Open the lock, not the temporary: NFS renames open files that are removed."""
        self.descriptor = os.open(self.path, os.O_RDONLY)
        if os.pread(self.descriptor, len(self.content) + 1, 0) == self.content:
            return True
        os.close(self.descriptor)  # another job has taken it over in the meantime
        self.descriptor = -1
        return False

    def _replace(self, path: Path, temporary: Path) -> None:
        """Replace the file of an ended job by this job's; raises InputError if that job runs.

        `path` is the lock, or a claim of a job that ended while it claimed. Returns without effect
        when the file changes meanwhile.
        """
        stale = self._content_of_ended_job(path)
        if stale is None:
            return
        claim = self._part("claim", path, stale)
        try:
            if not self._link(temporary, claim):
                self._replace(claim, temporary)
            # with the claim, no other job replaces or removes `path` while it is stale
            if self._contains(claim, self.content) and self._contains(path, stale):
                with suppress(FileNotFoundError):  # another job has taken the claim
                    claim.rename(path)
        finally:
            if self._contains(claim, self.content):
                claim.unlink(missing_ok=True)

    def _content_of_ended_job(self, path: Path) -> bytes | None:
        """Content of an ended job's file, None if the file is gone; InputError if the job runs."""
        try:
            renewed_at = path.stat().st_mtime_ns
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        host, pid, is_running = self._owner(content)
        if is_running is None:
            is_running = self._is_renewed(path, renewed_at)
        if is_running:
            raise InputError(
                f"{self.path.parent} is in use by process {pid} on {host}: wait for it, "
                "stop it, or choose another run.name"
            )
        return content

    def _owner(self, content: bytes) -> tuple[str, int, bool | None]:
        """Host and process of a file's owner; whether it runs, None if that is not known here."""
        try:
            owner = json.loads(content)
            name, pid, start = str(owner["machine"]), int(owner["pid"]), owner["start"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return "an unknown machine", 0, None
        is_running = start is not None and process_start(pid) == start
        return name.partition(" ")[0], pid, is_running if name == machine() else None

    def _is_renewed(self, path: Path, before: int) -> bool:
        """Whether the owner renews a file within `seconds`."""
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, self.seconds / 10))
            try:
                with path.open("rb") as file:  # opening refreshes cached attributes
                    if os.fstat(file.fileno()).st_mtime_ns != before:
                        return True
            except FileNotFoundError:
                return False
        return False

    def _link(self, source: Path, name: Path) -> bool:
        """Link a file of this job under a name; whether the name is this job's afterwards."""
        with suppress(FileExistsError):
            os.link(source, name)  # atomic, including the content
        return self._contains(name, self.content)

    def _part(self, kind: str, path: Path, content: bytes) -> Path:
        """Name of a short-lived file beside the lock, for a file with this content."""
        digest = hashlib.sha256(path.name.encode() + content).hexdigest()[:16]
        return self.path.with_name(f"{self.path.name}.{kind}-{digest}{TEMP_SUFFIX}")

    @staticmethod
    def _contains(path: Path, content: bytes) -> bool:
        try:
            return path.read_bytes() == content
        except FileNotFoundError:
            return False

    def _remove_parts_of_ended_jobs(self) -> None:
        """Remove what jobs that were killed while they took the lock have left."""
        for part in self.path.parent.glob(f"{self.path.name}.*{TEMP_SUFFIX}"):
            with suppress(OSError):
                if self._owner(part.read_bytes())[2] is False:
                    part.unlink()
