"""Run context: the lock of the folder, the outcome, starts without progress, full disks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core import files, log
from core.errors import InputError
from core.log import BestEffortStream
from core.records import read_typed_lines
from tests.commands import TIMEOUT_SECONDS
from tests.distributed import run_ranks
from tests.small import config
from tests.supervisor import CONTEXT
from train.build import sync_and_return_unwritten
from train.distributed import Ranks, errors_on_all_ranks, init_distributed
from train.metrics import curves
from train.metrics.records import JsonLines, read_lines, restore
from train.record.history import code_version
from train.resilience.incidents import INTERRUPTED, Incidents, Outcome, Starts, read_outcome
from train.resilience.run_lock import RunLock, process_start
from train.resilience.stop_request import StopRequest
from train.run_context import _draw_curves, run_context


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with init_distributed("cpu", 1) as ranks:
        yield ranks


def _hold_lock(folder: Path, ready: Any) -> None:
    RunLock(folder).acquire()
    ready.set()
    time.sleep(TIMEOUT_SECONDS)


@pytest.mark.fault(
    "two jobs in one run folder",
    "the second refuses and writes nothing; the lock of a dead job is taken over",
)
def test_second_job_is_refused_while_the_first_lives(tmp_path: Path, measured: Any) -> None:
    ready = CONTEXT.Event()
    first = CONTEXT.Process(target=_hold_lock, args=(tmp_path, ready))
    first.start()
    ready.wait()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=f"in use by process {first.pid} on"):
        RunLock(tmp_path).acquire()
    assert sorted(path.name for path in tmp_path.iterdir()) == before == ["run.lock"]
    first.kill()
    first.join()
    started_at = time.monotonic()
    run_lock = RunLock(tmp_path)
    run_lock.acquire()
    measured(f"taken over {time.monotonic() - started_at:.2f} s after kill -9")
    run_lock.release()
    assert list(tmp_path.iterdir()) == []


def test_code_version_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean and changed in the repository of the code; empty inside another repository."""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    script = tmp_path / "train" / "run.py"
    script.parent.mkdir()
    script.write_text("1\n")
    monkeypatch.setattr("train.record.history.ROOT", tmp_path)
    assert code_version() == {}
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert code_version() == {"commit": commit, "dirty": False}
    (tmp_path / "train" / "notes.txt").write_text("not part of the code")
    assert code_version() == {"commit": commit, "dirty": False}
    script.write_text("2\n")
    assert code_version() == {"commit": commit, "dirty": True}
    inner = tmp_path / "venv" / "train"
    inner.mkdir(parents=True)
    monkeypatch.setattr("train.record.history.ROOT", inner.parent)
    assert code_version() == {}


def lock_of_another_machine(folder: Path) -> Path:
    """Write the lock of a job on another machine; returns its path."""
    lock = folder / "run.lock"
    holder = {"machine": "node7 boot pid:[1]", "pid": 1, "start": "1"}
    lock.write_text(json.dumps(holder))
    return lock


def test_lock_of_another_machine_holds_while_it_is_renewed_whatever_its_clock_says(
    tmp_path: Path,
) -> None:
    lock = lock_of_another_machine(tmp_path)
    stop = threading.Event()

    def renew() -> None:
        past = 1_000_000_000  # years ago, and decreasing
        while not stop.wait(0.2):
            past -= 3600
            os.utime(lock, (past, past))

    holder = threading.Thread(target=renew, daemon=True)
    holder.start()
    with pytest.raises(InputError, match="on node7"):
        RunLock(tmp_path, seconds=TIMEOUT_SECONDS).acquire()
    stop.set()
    holder.join()
    RunLock(tmp_path, seconds=1.0).acquire()
    assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_lock_taken_by_another_job_is_noticed_and_not_removed(tmp_path: Path) -> None:
    run_lock = RunLock(tmp_path)
    run_lock.acquire()
    assert run_lock.renew()
    run_lock.path.unlink()
    lock_of_another_machine(tmp_path)
    assert not run_lock.renew()
    run_lock.release()
    assert "node7" in run_lock.path.read_text()


def test_process_start_identifies_a_process() -> None:
    assert process_start(os.getpid()) == process_start(os.getpid()) is not None
    assert process_start(2**22 + 1) is None


@pytest.mark.fault(
    "repeated crashes at the same step", "stops after max_starts; the reason names the last crash"
)
def test_starts_without_progress_stop(tmp_path: Path, measured: Any) -> None:
    incidents = Incidents(tmp_path)
    incidents.log("crash", "rank 3: CUDA error: uncorrectable ECC error")
    starts = Starts(tmp_path, limit=5)
    assert [starts.count(100, incidents) for _ in range(4)] == [None] * 4
    assert starts.count(200, incidents) is None  # a later checkpoint
    assert [starts.count(200, incidents) for _ in range(4)] == [None] * 4
    reason = starts.count(200, incidents)
    assert reason is not None
    assert "5 starts from 200 tokens" in reason and "uncorrectable ECC error" in reason
    measured("stopped at start 6 of 5")


def test_outcome_is_written_to_the_run_folder(tmp_path: Path, ranks: Ranks) -> None:
    run = config(tmp_path, "run")
    folder = run.run.folder
    assert run_context(
        run.run, run.health, {}, lambda watch, stop_request: Outcome(INTERRUPTED, "asked")
    ) == Outcome(INTERRUPTED, "asked")
    assert read_outcome(folder) == Outcome(75, "asked") and not (folder / "run.lock").exists()

    def user_error(watch: Any, stop_request: Any) -> Outcome:
        assert read_outcome(folder) is None and (folder / "run.lock").exists()
        raise InputError("no such thing; do this")

    with pytest.raises(InputError):
        run_context(run.run, run.health, {}, user_error)
    assert read_outcome(folder) == Outcome(2, "no such thing; do this")

    def crash(watch: Any, stop_request: Any) -> Outcome:
        raise OSError(errno.EIO, "Input/output error")

    # not an OSError, which the command would report as a user error
    with pytest.raises(RuntimeError):
        run_context(run.run, run.health, {}, crash)
    assert (
        read_outcome(folder) is None
        and list(read_typed_lines(Incidents(folder).path, dict[str, Any]))[-1]["incident"]
        == "crash"
    )


def test_restart_by_torchrun_after_an_interruption_returns_the_same_outcome(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, "run")
    run_context(run.run, run.health, {}, lambda watch, stop_request: Outcome(INTERRUPTED, "asked"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert (
        run_context(run.run, run.health, {}, lambda watch, stop_request: pytest.fail("it ran")).code
        == INTERRUPTED
    )
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert (
        run_context(run.run, run.health, {}, lambda watch, stop_request: Outcome(0, "done")).code
        == 0
    )


@pytest.mark.fault(
    "a run folder that cannot be written", "one line with the reason before training"
)
def test_read_only_folder_is_refused(tmp_path: Path, ranks: Ranks, measured: Any) -> None:
    run = config(tmp_path, "run")
    run.run.dir = "/proc/run"
    with pytest.raises(InputError, match="run.dir /proc/run cannot be written"):
        run_context(run.run, run.health, {}, lambda watch, stop_request: pytest.fail("it ran"))
    measured("refused before the model is built")


@pytest.mark.fault(
    "a full disk for the logs", "records wait in memory and are written when there is space"
)
def test_full_disk_loses_and_truncates_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Any
) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    free_bytes = [10_000]

    class FullDisk:
        """A file on a disk that fills up within a line."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, line: bytes) -> int:
            if free_bytes[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written: int = self.file.write(line[: free_bytes[0]])
            free_bytes[0] -= written
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    sink.file = FullDisk(sink.file)  # type: ignore[assignment]
    figures = {"loss": 1.5, "source_loss": {}, "grad_norm": 1.0, "skipped": False, "stage": "a"}
    for step in range(500):
        sink.write({"step": step, "tokens": step, **figures})
        if step == 400:
            unwritten = sync_and_return_unwritten(tmp_path, sink, lambda: None)
            shutil.copy(tmp_path / "metrics.jsonl", tmp_path / "killed.jsonl")
            free_bytes[0] = 10**9
    sink.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(500))
    # a kill after the save: a resume from it has every line, once, also after another one
    for _ in range(2):
        restore(tmp_path / "killed.jsonl", unwritten, 390)
    assert [line["step"] for line in read_lines(tmp_path / "killed.jsonl")] == list(range(391))
    measured("500 of 500 lines, none truncated")


def test_standard_output_on_a_full_disk_does_not_stop_the_run() -> None:
    out = BestEffortStream(open("/dev/full", "w", buffering=1))  # noqa: SIM115
    print("a line", file=out, flush=True)  # type: ignore[call-overload]
    with pytest.raises(OSError):
        out.stream.write("x\n" * 10_000)


@pytest.mark.fault("a clock that jumps", "limits and rates use the monotonic clock")
def test_time_limit_does_not_depend_on_the_wall_clock(
    monkeypatch: pytest.MonkeyPatch, measured: Any
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 1000))
    stop_request = StopRequest(None, margin_seconds=100.0)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert stop_request.reason() is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 901)
    assert stop_request.reason() == "stopped by Slurm's time limit"
    measured("0 effect of +70 years")


def test_stop_request_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first signal counts; of two time limits, the earlier one."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    reasons = {signal.SIGINT: "stopped by Ctrl-C", signal.SIGTERM: "stopped by SIGTERM"}
    for number, reason in reasons.items():
        stop_request = StopRequest(None, 0.0)
        stop_request._handle(number, None)
        stop_request._handle(signal.SIGUSR1, None)
        assert stop_request.reason() == reason
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    stop_request = StopRequest(None, 0.0)
    stop_request._handle(signal.SIGUSR1, None)
    assert stop_request.reason() == "stopped by SIGUSR1 (Slurm's notice)"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 1000))
    assert StopRequest(0.0, 0.0).reason() == "stopped by health.stop_after_seconds"
    assert StopRequest(2000.0, 1000.0).reason() == "stopped by Slurm's time limit"
    # a launcher that ended while the rank started
    assert StopRequest(None, 0.0, launcher=-1).reason() == "stopped because its launcher ended"


@pytest.mark.parametrize("text", ["Unknown", "", "NONE", "nan", "inf", "0", "1e999", "2026-11-30"])
def test_an_end_time_of_slurm_that_is_none_is_a_warning(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    assert StopRequest(None, 600.0).reason() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: SLURM_JOB_END_TIME is {text!r}, no time to come")


@pytest.mark.fault("a full disk at the start, in the build and at the end", "exit 2 and outcome")
def test_a_full_disk_ends_with_an_outcome(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outcome is written into reserved space; where none was free, the exit code says it."""
    run = config(tmp_path, "run")
    write_atomic = files.write_atomic

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def body(watch: Any, stop_request: Any) -> Outcome:
        monkeypatch.setattr(files, "write_atomic", full)
        files.write_text(run.run.folder / "config.yaml", "")
        return Outcome(0, "not reached")

    with pytest.raises(InputError, match="No space left on device: free space on the disk of"):
        run_context(run.run, run.health, {}, body)
    outcome = read_outcome(run.run.folder)
    assert outcome is not None and outcome.code == 2 and "free space" in outcome.reason
    monkeypatch.setattr(files, "write_atomic", write_atomic)
    left = ["heartbeats", "outcome.json"]
    assert sorted(path.name for path in run.run.folder.iterdir()) == left

    write_bytes = Path.write_bytes
    for name in ("run.lock.", "outcome.space"):

        def write(path: Path, content: bytes, name: str = name) -> int:
            if path.name.startswith(name):
                path.touch()
                full()
            return write_bytes(path, content)

        monkeypatch.setattr(Path, "write_bytes", write)
        with pytest.raises(InputError, match=r"cannot be written \(.*No space left"):
            run_context(run.run, run.health, {}, lambda *_: pytest.fail("it ran"))
        assert sorted(path.name for path in run.run.folder.iterdir()) == left


def test_a_full_disk_after_the_last_save_changes_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log.init_logger()
    monkeypatch.setattr(curves, "write_atomic", full)
    _draw_curves(tmp_path)
    assert capsys.readouterr().out.startswith("warning: no curves ([Errno 28] No space left on")


@pytest.mark.parametrize(
    "code, name, old",
    [(0, "finished", "finished"), (75, "interrupted", "requeue"), (2, "failed", "stopped")],
)
def test_outcome_names_and_names_of_older_versions(
    tmp_path: Path, code: int, name: str, old: str
) -> None:
    Outcome(code, "why").write(tmp_path)
    path = tmp_path / "outcome.json"
    assert json.loads(path.read_text()) == {"outcome": name, "code": code, "reason": "why"}
    path.write_text(json.dumps({"outcome": old, "code": code, "reason": "why"}))
    assert read_outcome(tmp_path) == Outcome(code, "why")


def test_incident_is_written_if_the_console_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    incidents = Incidents(tmp_path)
    incidents.log("skip", "a loss that is not finite", step=3)
    (line,) = read_typed_lines(incidents.path, dict[str, Any])
    assert (line["incident"], line["step"]) == ("skip", 3)


def _one_rank_fails(root: Path) -> None:
    with init_distributed("cpu", 1) as ranks:
        try:
            with errors_on_all_ranks():
                if ranks.rank == 1:
                    raise InputError("run.init_from: not on this node")
        except InputError as error:
            (root / f"rank-{ranks.rank}").write_text(str(error))


def test_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    run_ranks(2, [(_one_rank_fails, (tmp_path,))])
    errors = [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)]
    assert errors == ["run.init_from: not on this node"] * 2
