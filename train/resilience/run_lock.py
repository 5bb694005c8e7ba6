"""Lock a run's folder for one job, with a lock file that the holder renews.

A second job refuses to start while the holder lives. On the same machine it checks the holder's
process. Elsewhere it watches for LOCK_TIMEOUT_SECONDS whether the file's time changes: only changes
count, so clocks that differ or jump do not matter.
"""

import json
import os
import socket
import time
from pathlib import Path

from core.errors import InputError
from core.files import TEMP_SUFFIX
from core.run import RunFiles

LOCK_TIMEOUT_SECONDS = 60.0  # longer than network file systems cache attributes
RENEW_SECONDS = 10.0


def machine() -> str:
    """Identify this machine, its boot and its PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


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
        self.descriptor = -1

    def acquire(self) -> None:
        """Acquire the lock. Raises InputError, and writes nothing, while another job holds it.

        Takes over from a job that has ended: at once on the same machine, elsewhere after
        `seconds`.
        """
        owner = {"machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())}
        temporary = self.path.with_name(
            f"{self.path.name}.{os.getpid()}.{time.monotonic_ns()}{TEMP_SUFFIX}"
        )
        temporary.write_text(json.dumps(owner) + "\n", encoding="utf-8")
        try:
            while True:
                try:
                    os.link(temporary, self.path)  # atomic, including the content
                    break
                except FileExistsError:
                    self._clear()
        finally:
            temporary.unlink()
        self.descriptor = os.open(self.path, os.O_RDONLY)

    def renew(self) -> bool:
        """Touch the lock file, which needs no disk space; False if another job has the lock."""
        try:
            os.utime(self.descriptor)
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
        except OSError:  # a hanging or read-only file system does not mean another holder
            return True

    def release(self) -> None:
        """Release the lock, unless another job has taken it."""
        if self.descriptor >= 0:
            if self.renew():
                self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1

    def _clear(self) -> None:
        """Remove the lock of an ended job; raises InputError if the job runs."""
        try:
            stale = self.path.stat()
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            host = str(holder["machine"])
            pid = int(holder["pid"])
            start = holder["start"]
        except FileNotFoundError:
            return  # released in the meantime
        except (ValueError, KeyError, TypeError):
            host = "an unknown machine"
            pid = 0
            start = None
        if host == machine():
            is_running = process_start(pid) == start
        else:
            is_running = self._is_renewed(stale.st_mtime_ns)
        if is_running:
            raise InputError(
                f"{self.path.parent} is in use by process {pid} on {host.split()[0]}: wait for it, "
                "stop it, or choose another run.name"
            )
        try:
            if os.path.samestat(stale, self.path.stat()):
                self.path.unlink()
        except FileNotFoundError:
            return  # removed by another job; acquire tries again

    def _is_renewed(self, before: int) -> bool:
        """Whether the holder renews the lock within `seconds`."""
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, self.seconds / 10))
            try:
                with self.path.open("rb") as file:  # opening refreshes cached attributes
                    if os.fstat(file.fileno()).st_mtime_ns != before:
                        return True
            except FileNotFoundError:
                return False
        return False
