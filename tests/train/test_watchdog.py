"""Watchdog: what ends a rank, what counts as progress, and that no storage can hold it up."""

import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import train.resilience.progress as progress_module
from core.records import read_typed_lines
from tests.commands import ROOT, TIMEOUT_SECONDS
from tests.distributed import run_ranks
from train.distributed import init_distributed
from train.resilience import last_words, watchdog
from train.resilience.incidents import HUNG
from train.resilience.progress import Progress
from train.resilience.run_lock import RunLock
from train.resilience.watchdog import Watchdog

LIMIT = 8.0
DELAY = 2 * watchdog.TICK_SECONDS + watchdog.OBSERVE_SECONDS  # of the end of a hung rank


def run_clock(
    watch: Watchdog,
    monkeypatch: pytest.MonkeyPatch,
    until: float,
    at: Callable[[float], float | None] = lambda now: None,
) -> tuple[float | None, str]:
    """Run the counting thread on a simulated clock up to `until` seconds.

    `at(now)` is called at each tick and returns for how many seconds the process then stops.
    Returns when the rank was ended, and its last words.
    """
    now = [0.0]
    ends: list[float] = []
    words: list[str] = []

    def wait(seconds: float) -> bool:
        now[0] += seconds
        now[0] += at(now[0]) or 0.0
        return bool(ends) or now[0] > until

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog, "exit_now", lambda code: ends.append(now[0]))
    monkeypatch.setattr(watchdog, "leave_last_words", lambda *arguments: words.append(arguments[4]))
    monkeypatch.setattr(watch.stopped, "wait", wait)
    watch._watch()
    monkeypatch.undo()
    return (ends[0], words[0]) if ends else (None, "")


def answered(watch: Watchdog) -> None:
    """The storage answers."""
    watch.num_answers += 1


def test_a_rank_ends_at_its_limit_unless_it_progresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watchdog(tmp_path, 0, 1, LIMIT)
    watch.enter_phase(7, "forward")
    end, text = run_clock(watch, monkeypatch, 100, lambda now: answered(watch))
    assert end is not None and LIMIT < end <= LIMIT + DELAY
    assert text.startswith("rank 0 made no progress for ") and "(step 7, forward)" in text

    def step(now: float) -> None:
        answered(watch)
        if now % (LIMIT / 2) == 0 and now < 100:
            watch.enter_phase(int(now), "forward")

    watch = Watchdog(tmp_path, 0, 1, LIMIT)
    end, text = run_clock(watch, monkeypatch, 200, step)
    assert end is not None and 96 + LIMIT < end <= 96 + LIMIT + DELAY and "step 96" in text


@pytest.mark.fault("a save that takes long", "bytes are progress; one whose bytes stand still ends")
def test_a_slow_save_goes_on_and_one_that_stands_still_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Any
) -> None:
    watch = Watchdog(tmp_path, 0, 1, LIMIT)
    watch.enter_phase(16, "save", patience=6.0)

    def save(now: float) -> None:
        answered(watch)
        if now <= 3600 and now % 12 == 0:  # one sync takes longer than the limit
            watch.beat()

    end, text = run_clock(watch, monkeypatch, 7200, save)
    assert end is not None and 3600 + 6 * LIMIT < end <= 3600 + 6 * LIMIT + DELAY
    assert "(step 16, save)" in text
    measured(f"limit {LIMIT:.0f} s: a save of 3,600 s goes on, one that stops then ends at once")


@pytest.mark.fault("the run's folder hangs", "the rank ends within its limit plus 5 s")
def test_storage_that_hangs_gets_no_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watchdog(tmp_path, 0, 1, LIMIT)
    watch.enter_phase(16, "save", patience=6.0)
    end, text = run_clock(watch, monkeypatch, 100)
    assert end is not None and end <= LIMIT + DELAY
    assert f"{tmp_path} has not answered for" in text


@pytest.mark.fault("a job is stopped and continued, a laptop sleeps", "the ranks go on")
def test_time_in_which_the_process_did_not_run_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watchdog(tmp_path, 0, 1, LIMIT)
    watch.enter_phase(7, "forward")

    def stop(now: float) -> float | None:
        answered(watch)
        return 600.0 if now == LIMIT / 2 else None

    end, _ = run_clock(watch, monkeypatch, 10_000, stop)
    assert end is not None and 600 + LIMIT - 2 * watch.tick < end <= 600 + LIMIT + DELAY


@pytest.mark.fault("a clock that is set", "no effect on the watchdog")
@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_is_set_has_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    ends = []
    for offset in (0.0, jump):
        watch = Watchdog(tmp_path, 0, 1, LIMIT)
        watch.enter_phase(7, "forward")
        wall = time.time()

        def set_clock(now: float, watch: Watchdog = watch, to: float = wall + offset) -> None:
            answered(watch)
            if now > LIMIT / 2:
                monkeypatch.setattr(time, "time", lambda: to)

        ends.append(run_clock(watch, monkeypatch, 100, set_clock)[0])
    assert ends[0] == ends[1] is not None


def test_a_rank_that_hangs_logs_its_phase_and_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exit_codes: queue.Queue[int] = queue.Queue()
    watch = Watchdog(tmp_path, 0, 1, hang_seconds=0.2)
    monkeypatch.setattr(watchdog, "exit_now", lambda code: (watch.stop(), exit_codes.put(code)))
    watch.enter_phase(7, "forward")
    watch.watch()
    watch.start(None)
    assert exit_codes.get(timeout=TIMEOUT_SECONDS) == HUNG
    (entry,) = read_typed_lines(watch.incidents.path, dict[str, Any])
    assert entry["incident"] == "hang" and "(step 7, forward); furthest behind" in entry["text"]


def test_a_phase_may_take_its_patience_times_the_limit(tmp_path: Path) -> None:
    watch = Watchdog(tmp_path, 0, 1, hang_seconds=5.0)
    watch.enter_phase(7, "forward")
    watch.idle_seconds = 6.1
    assert watch._hangs()
    watch.enter_phase(7, "save", patience=6.0)
    assert not watch._hangs()
    watch.unanswered_seconds = 5.0  # its storage hangs
    assert watch._hangs()


def test_a_lost_lock_ends_the_rank_and_a_released_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exit_codes: queue.Queue[int] = queue.Queue()
    watch = Watchdog(tmp_path, 0, 1, hang_seconds=0.8)
    monkeypatch.setattr(watchdog, "exit_now", lambda code: (watch.stop(), exit_codes.put(code)))
    watch.enter_phase(7, "forward", patience=1e9)
    lock = RunLock(tmp_path)
    lock.acquire()
    renew, renewals = lock.renew, queue.Queue()  # type: ignore[var-annotated]

    def released_meanwhile() -> bool:
        watch.run_lock = None
        renewals.put(renew)
        return False

    monkeypatch.setattr(lock, "renew", released_meanwhile)
    watch.watch()
    watch.start(lock)
    renewals.get(timeout=TIMEOUT_SECONDS)
    assert not watch.lost_lock
    monkeypatch.setattr(lock, "renew", renew)
    lock.path.unlink()
    lock.path.write_text("another job's")
    watch.run_lock = lock
    assert exit_codes.get(timeout=TIMEOUT_SECONDS) == HUNG
    *_, entry = read_typed_lines(watch.incidents.path, dict[str, Any])
    assert entry["incident"] == "lost run lock"


@pytest.fixture(scope="module")
def hung_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload, under which a folder hangs."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    library = tmp_path_factory.mktemp("shim") / "hung_storage.so"
    source = ROOT / "tests" / "hung_storage.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


LOOP = """
import sys
from pathlib import Path
from train.resilience.watchdog import Watchdog

folder = Path(sys.argv[1])
watch = Watchdog(folder, 0, 1, hang_seconds=2.0)
watch.watch()
if sys.argv[2] != "start":
    watch.start(None)
metrics = (folder / "metrics.jsonl").open("ab", buffering=0)
watch.enter_phase(3, "log", patience=1e6)
print("ready", flush=True)
sys.stdin.readline()  # the storage hangs from here on
watch.enter_phase(3, sys.argv[2], patience=6.0)
metrics.write(b"a line")
"""


@pytest.mark.parametrize(
    ("hangs", "phase"),
    [
        ("the run", "log"),
        ("the run", "start"),
        ("the run and stderr", "log"),
        ("everything", "save"),
    ],
)
@pytest.mark.fault("the run's folder hangs", "the rank ends and leaves its stacks elsewhere")
def test_storage_that_hangs_does_not_hold_the_watchdog(
    tmp_path: Path, hung_storage: Path, hangs: str, phase: str, measured: Any
) -> None:
    run, local = tmp_path / "run", tmp_path / "local"
    run.mkdir()
    local.mkdir()
    flag = tmp_path / "HUNG"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": str(hung_storage),
        "HUNG_DIR": str(tmp_path if hangs == "everything" else run),
        "HUNG_FLAG": str(flag),
        "TMPDIR": str(local),
    }
    stderr = (tmp_path if hangs == "the run" else run) / "stderr"
    with (
        stderr.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-c", LOOP, str(run), phase],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n", stderr.read_text()
        flag.touch()
        started_at = time.monotonic()
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(TIMEOUT_SECONDS) == HUNG
        measured(f"{hangs} hangs: ended after {time.monotonic() - started_at:.1f} s, limit 2 s")
    places = list(local.rglob("hang-*"))
    assert bool(places) == (hangs != "everything")
    texts = [path.read_text() for path in places] + [stderr.read_text()] * (hangs == "the run")
    for text in texts:
        assert f"(step 3, {phase}); {run} has not answered for" in text and "Thread 0x" in text
    if hangs == "the run":
        assert str(places[0]) in stderr.read_text()
        assert places[0].stat().st_mode & 0o077 == places[0].parent.stat().st_mode & 0o077 == 0
    assert not (run / "incidents.jsonl").exists()


def test_the_folder_of_last_words_is_no_other_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_words.tempfile, "tempdir", str(tmp_path))
    path = tmp_path / f"falcon-mamba-{os.getuid()}"
    assert last_words.private_folder() == last_words.private_folder() == path
    path.chmod(0o777)
    assert last_words.private_folder() != path
    path.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    path.symlink_to("elsewhere")
    folder = last_words.private_folder()
    assert folder.parent == tmp_path and folder != path and not list(path.iterdir())
    assert folder.stat().st_mode & 0o777 == 0o700


def _work(folder: Path, goes_on: bool) -> None:
    progress_module.EXCHANGE_SECONDS = 0.1
    with init_distributed("cpu", 1) as ranks:
        progress = Progress(dist.new_group(backend="gloo"))
        reports: list[float] = []

        def slow() -> int:
            for _ in range(4):
                time.sleep(0.3)
                progress.add(goes_on)
            return 7

        result = progress.run(
            slow if ranks.rank == 1 else lambda: 5, lambda: reports.append(time.monotonic())
        )
        assert result == (7 if ranks.rank == 1 else 5)
        (folder / f"{goes_on}-{ranks.rank}").write_text(str(len(reports)))


def test_every_rank_learns_that_the_work_of_another_goes_on(tmp_path: Path) -> None:
    run_ranks(2, [(_work, (tmp_path, True)), (_work, (tmp_path, False))])
    counts = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert counts["True-0"] == counts["True-1"] >= 2
    assert counts["False-0"] == counts["False-1"] == 0
