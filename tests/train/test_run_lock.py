"""A lock is taken by one job, whatever other jobs do between any two of its file operations."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from train.resilience import run_lock
from train.resilience.run_lock import RunLock

OPERATIONS = ((os, "link"), (Path, "rename"), (Path, "unlink"), (Path, "read_bytes"))
DEAD_PID = 2**22 + 1  # above the kernel's maximum


class Killed(BaseException):
    """A job that ends between two file operations, as by kill -9."""


class Job:
    """A job that takes the lock; `pause(n)` is called before its n-th file operation."""

    def __init__(self, folder: Path, name: str, pause: Callable[[int], None]) -> None:
        self.lock = RunLock(folder, seconds=0.0)  # a paused job counts as ended at once
        self.name = name
        self.pause = pause
        self.operations = 0

    def call(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        """Call a method of the lock on this job's own machine."""
        with self._active(monkeypatch), suppress(InputError):
            getattr(self.lock, method)()

    @contextmanager
    def _active(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(run_lock, "machine", lambda: f"{self.name} boot pid:[1]")
            for owner, name in OPERATIONS:
                patch.setattr(owner, name, self._pausing(getattr(owner, name)))
            yield

    def _pausing(self, operation: Any) -> Any:
        def paused(*arguments: Any, **options: Any) -> Any:
            self.operations += 1
            self.pause(self.operations)
            return operation(*arguments, **options)

        return paused

    def holds(self) -> bool:
        """Whether the lock's file is this job's."""
        return self.lock.descriptor >= 0 and self.lock.renew()


def stale_lock(folder: Path) -> None:
    """Write the lock of a job that has ended on another machine."""
    folder.mkdir()
    holder = {"machine": "node7 boot pid:[1]", "pid": 1, "start": "1"}
    (folder / "run.lock").write_text(json.dumps(holder))


def interleave(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[int, ...], methods: list[str]
) -> list[Job]:
    """Run jobs nested: each starts before the file operation number `at` of the one before it."""
    stale_lock(folder)
    jobs: list[Job] = []
    real = {name: getattr(owner, name) for owner, name in OPERATIONS}

    def start(depth: int) -> None:
        def pause(number: int) -> None:
            if depth < len(at) and number == at[depth]:
                with monkeypatch.context() as patch:
                    for owner, name in OPERATIONS:
                        patch.setattr(owner, name, real[name])
                    start(depth + 1)

        job = Job(folder, f"machine{depth}", pause)
        jobs.append(job)
        for method in methods:
            job.call(monkeypatch, method)

    start(0)
    return jobs


@pytest.mark.fault(
    "a lock is taken over while file operations stand still",
    "rename or link of one's own file decides: one holder",
)
def test_one_holder_whatever_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Any
) -> None:
    """Two jobs at every operation, three at every pair; each believes the paused one ended."""
    length = interleave(tmp_path / "alone", monkeypatch, (), ["acquire"])[0].operations
    orders = [(first,) for first in range(1, length + 1)]
    orders += [(first, second) for first in range(1, length + 1) for second in range(1, length + 1)]
    for number, order in enumerate(orders):
        folder = tmp_path / str(number)
        jobs = interleave(folder, monkeypatch, order, ["acquire"])
        assert [job.holds() for job in jobs].count(True) == 1, order
        assert [path.name for path in folder.iterdir()] == ["run.lock"], order
    measured(f"{len(orders)} of {len(orders)} orders of two and three jobs")


def test_a_release_never_removes_the_lock_of_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job takes the lock before any operation of the first one's release."""
    first = interleave(tmp_path / "alone", monkeypatch, (), ["acquire", "release"])[0]
    for at in range(1, first.operations + 1):
        folder = tmp_path / str(at)
        stale_lock(folder)
        second = Job(folder, "machine2", lambda number: None)

        def pause(number: int, at: int = at, second: Job = second) -> None:
            if number == at:
                second.call(monkeypatch, "acquire")

        first = Job(folder, "machine1", pause)
        first.call(monkeypatch, "acquire")
        first.call(monkeypatch, "release")
        left = sorted(path.name for path in folder.iterdir())
        assert left == (["run.lock"] if second.holds() else []), at


def test_a_job_killed_while_it_takes_the_lock_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are removed by the next job of the machine."""
    number = 0
    killed = True
    while killed:
        number += 1
        folder = tmp_path / str(number)
        stale_lock(folder)

        def kill(operation: int, number: int = number) -> None:
            if operation >= number:  # the operations of its `finally` do not happen either
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: DEAD_PID)
            try:
                Job(folder, "machine1", kill).call(monkeypatch, "acquire")
                killed = False
            except Killed:
                pass
        job = Job(folder, "machine1", lambda operation: None)
        job.call(monkeypatch, "acquire")
        assert job.holds()
        assert [path.name for path in folder.iterdir()] == ["run.lock"], number
    assert number > 5


def test_a_link_that_was_made_though_the_call_failed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS repeats a request whose answer was lost, and reports that the name exists."""
    link = os.link

    def lost_answer(*arguments: Any, **options: Any) -> None:
        link(*arguments, **options)
        raise FileExistsError

    monkeypatch.setattr(os, "link", lost_answer)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert lock.renew()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        RunLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []
