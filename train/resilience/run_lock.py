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

LOCK_TIMEOUT_SECONDS = 60.0  # longer than a network file system keeps attributes cached
RENEW_SECONDS = 10.0


def machine() -> str:
    """This machine since its last boot, and the process ids that are visible in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in kernel ticks; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class RunLock:
    """The lock of one run folder, held by its first rank."""

    def __init__(self, folder: Path, seconds: float = LOCK_TIMEOUT_SECONDS) -> None:
        self.path = RunFiles(folder).lock
        self.seconds = seconds
        self.descriptor = -1

    def acquire(self) -> None:
        """Hold the lock; raises InputError while another job does, and then has written nothing.

        Takes over from a job that is gone, after a moment on the same machine and after `seconds`
        elsewhere.
        """
        mine = {"machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())}
        part = self.path.with_name(
            f"{self.path.name}.{os.getpid()}.{time.monotonic_ns()}{TEMP_SUFFIX}"
        )
        part.write_text(json.dumps(mine) + "\n", encoding="utf-8")
        try:
            while True:
                try:
                    os.link(part, self.path)  # with its content, or not at all
                    break
                except FileExistsError:
                    self._clear()
        finally:
            part.unlink()
        self.descriptor = os.open(self.path, os.O_RDONLY)

    def renew(self) -> bool:
        """Show that the holder lives, without disk space; False when the lock is another's."""
        try:
            os.utime(self.descriptor)
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
        except OSError:  # a file system that hangs or turned read-only is no other holder
            return True

    def release(self) -> None:
        """Give the lock back, unless it is another's by now."""
        if self.descriptor >= 0:
            if self.renew():
                self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1

    def _clear(self) -> None:
        """Remove the lock of a job that is gone; raises InputError when it lives."""
        try:
            stale = self.path.stat()
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            where, pid, start = str(holder["machine"]), int(holder["pid"]), holder["start"]
        except FileNotFoundError:
            return  # given back in this moment
        except (ValueError, KeyError, TypeError):
            where, pid, start = "an unknown machine", 0, None
        lives = (
            process_start(pid) == start if where == machine() else self._changes(stale.st_mtime_ns)
        )
        if lives:
            raise InputError(
                f"{self.path.parent} is in use by process {pid} on {where.split()[0]}: wait for "
                "it, end it, or choose another run.name"
            )
        try:
            if os.path.samestat(stale, self.path.stat()):
                self.path.unlink()
        except FileNotFoundError:
            return  # somebody else removed it, and taking it is tried next

    def _changes(self, before: int) -> bool:
        """Whether the lock is renewed within `seconds`."""
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, self.seconds / 10))
            try:
                with self.path.open("rb") as file:  # opening asks the file server anew
                    if os.fstat(file.fileno()).st_mtime_ns != before:
                        return True
            except FileNotFoundError:
                return False
        return False
