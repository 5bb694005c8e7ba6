"""Checkpoints: atomic commit, background writes, verification, retention, and no code execution."""

import errno
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import model.checkpoint
import train.checkpoint.writer as writer_module
import train.resilience.progress as progress_module
from core.errors import InputError
from core.files import sha256_of
from core.run import iter_checkpoints
from model.checkpoint import (
    CheckpointReader,
    TensorShard,
    newest_valid,
    read_manifest,
    verify_checkpoint,
)
from tests.commands import python
from tests.injector import WRITE_POINTS, Fault, Injector
from tests.supervisor import CONTEXT
from train.checkpoint.manager import CheckpointManager, TrainState
from train.checkpoint.writer import CheckpointWriter
from train.checkpoints import main as inspect
from train.config import CheckpointConfig
from train.distributed import Ranks, init_distributed

KEEP = CheckpointConfig(100, 2, None, False, retry_seconds=0.0, max_failures=3)
STATE = TrainState(100, 1, 1, "plan", {"d_model": 4})


class StubEngine:
    """An engine with only state: `count` tensors of `size` elements."""

    def __init__(self, count: int = 3, size: int = 1000) -> None:
        generator = torch.Generator().manual_seed(count)
        self.tensors = {f"layer.{i}": torch.randn(size, generator=generator) for i in range(count)}
        self.updates = -1

    def backward(self, loss: Tensor, last: bool) -> None:
        raise NotImplementedError

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        raise NotImplementedError

    def skip_step(self) -> None:
        raise NotImplementedError

    def state_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        for name, tensor in self.tensors.items():
            yield TensorShard("param", name, tuple(tensor.shape), 0, 1, 0, tensor.numel()), tensor

    def load(self, reader: CheckpointReader, updates: int) -> None:
        self.updates = updates
        for name, tensor in self.tensors.items():
            tensor.copy_(reader.read_range("param", name, 0, 1, 0, tensor.numel()))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with init_distributed("cpu", 1) as one_rank:
        yield one_rank


def save_steps(
    folder: Path,
    ranks: Ranks,
    steps: int = 1,
    config: CheckpointConfig = KEEP,
    stage_ends: tuple[int, ...] = (),
) -> StubEngine:
    """Save checkpoints of steps 1, 2, ... with 100 tokens each."""
    engine = StubEngine()
    checkpoints = CheckpointManager(folder, config, ranks, frozenset(stage_ends))
    for step in range(1, steps + 1):
        checkpoints.save_and_wait(replace(STATE, step=step, tokens=100 * step), engine)
    return engine


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in iter_checkpoints(folder)]


@pytest.mark.fault("the cost of a save", "the loop waits only for the copy to host memory")
def test_the_loop_waits_for_the_copy_only(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, measured: Any
) -> None:
    """save() returns before a byte is written and takes at most 10 % of the save's CPU time."""
    engine, gate, write = StubEngine(count=24, size=2_000_000), Event(), CheckpointWriter._write
    monkeypatch.setattr(
        CheckpointWriter, "_write", lambda self, part: (gate.wait(), write(self, part))[1]
    )
    checkpoints = CheckpointManager(tmp_path, KEEP, ranks, frozenset())
    shares, waits = [], []
    for step in range(1, 5):
        gate.clear()
        started_at = time.monotonic()
        process_started_at = time.process_time()
        thread_started_at = time.thread_time()
        wait_seconds = checkpoints.save(replace(STATE, step=step), engine)
        thread_seconds = time.thread_time() - thread_started_at
        assert checkpoints.writer.is_saving and steps_in(tmp_path)[:1] == [step - 1][: step - 1]
        gate.set()
        checkpoints.wait()
        shares.append(thread_seconds / (time.process_time() - process_started_at))
        waits.append(wait_seconds / (time.monotonic() - started_at))
    measured(f"{min(waits[1:]):.1%} of the synchronous time (192 MB)")
    assert min(shares[1:]) <= 0.10  # the first one allocates the host buffers


def test_changes_after_the_copy_are_not_saved(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StubEngine()
    before = {name: tensor.clone() for name, tensor in engine.tensors.items()}
    write, updated = writer_module.write_tensors, Event()
    monkeypatch.setattr(writer_module, "write_tensors", lambda *a: (updated.wait(), write(*a))[1])
    checkpoints = CheckpointManager(tmp_path, KEEP, ranks, frozenset())
    checkpoints.save(STATE, engine)
    for tensor in engine.tensors.values():
        tensor.add_(1)  # the next update
    updated.set()
    assert checkpoints.wait()
    reader = CheckpointReader(next(iter_checkpoints(tmp_path)))
    assert all(
        torch.equal(reader.read_range("param", name, 0, 1, 0, 1000), value)
        for name, value in before.items()
    )


def test_retention_keeps_the_last_stage_ends_and_multiples(tmp_path: Path, ranks: Ranks) -> None:
    config = CheckpointConfig(100, 2, 400, True, 0.0, 3)
    save_steps(tmp_path, ranks, steps=14, config=config, stage_ends=(700, 1400))
    # 4, 8, 12: the first past each multiple of 400 tokens; 7, 14: stage ends; 13, 14: the last
    assert steps_in(tmp_path) == [14, 13, 12, 8, 7, 4]


def test_copies_and_strays_stop_nothing_and_are_not_removed(
    tmp_path: Path, ranks: Ranks, capsys: Any
) -> None:
    """They are neither counted nor loaded; one that is in the way of a save is renamed."""
    save_steps(tmp_path, ranks, steps=2)
    step = tmp_path / "step-00000002"
    for name in ("step-00000009", "step-2", "step-00000002.bak", "step-00000002 (copy)"):
        shutil.copytree(step, tmp_path / name)
    shutil.copytree(step, tmp_path / "step-000000000000000000000000000000000002")
    for name in ("x.part", "step-00000003.part", "step-00000004", "step-00000001.old.part"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.part").mkdir()
    (tmp_path / "step-00000005").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-00000007").symlink_to(tmp_path / "step-2")
    (tmp_path / "step-00000006").mkdir()
    (tmp_path / "step-00000001.part").mkdir()  # of a killed save
    before = {path.name for path in tmp_path.iterdir()}
    save_steps(tmp_path, ranks, steps=5)
    # 9 is a copy, 7 a link, 6 empty: they remain, beside the last two that were saved
    assert steps_in(tmp_path) == [9, 7, 6, 5, 4]
    assert {path.name for path in tmp_path.iterdir()} >= before - {
        *("step-00000001", "step-00000002", "step-00000004", "step-00000005"),
        *("step-00000001.part", "step-00000003.part", "step-00000001.old.part"),
    }
    for name in ("step-00000003.part", "step-00000004", "step-00000001.old.part"):
        (aside,) = tmp_path.glob(f"{name}.stray-*")
        assert aside.read_text() == name
    capsys.readouterr()
    checkpoints = CheckpointManager(tmp_path, KEEP, ranks, frozenset())
    assert checkpoints.find_latest() == tmp_path / "step-00000005"
    out = capsys.readouterr().out
    assert "step-00000002 (copy), step-00000002.bak, step-2" in out and "are no checkpoints" in out
    assert "skipped step-00000009: its state.json is of step 2: the folder is a copy" in out
    assert "x.part" in out and ".stray-" not in out.split("are no checkpoints")[0]
    (aside,) = tmp_path.glob("step-00000009.stray-*")
    assert verify_checkpoint(aside) is None
    assert [path.name[:13] for path in tmp_path.glob("*.damaged-*")] == ["step-00000006"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_start_renames_nothing_that_it_cannot_read(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    save_steps(tmp_path, ranks, steps=2)
    before = sorted(tmp_path.iterdir())

    def fail(path: Path, *arguments: object) -> str:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(model.checkpoint, "sha256_of", fail)
    checkpoints = CheckpointManager(tmp_path, KEEP, ranks, frozenset())
    with pytest.raises(InputError, match=f"step-00000002 cannot be read .*{os.strerror(code)}"):
        checkpoints.find_latest()
    assert sorted(tmp_path.iterdir()) == before


def test_a_save_is_due_at_multiples_and_stage_ends(tmp_path: Path, ranks: Ranks) -> None:
    checkpoints = CheckpointManager(tmp_path, KEEP, ranks, frozenset({250}))
    due = [tokens for tokens in range(10, 400, 10) if checkpoints.is_due(tokens - 10, tokens)]
    assert due == [100, 200, 250, 300]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.fault(
    "disk full while saving", "the partial write is removed, the run continues and tries again"
)
def test_a_full_disk_costs_a_save_and_nothing_else(
    small_disk: Path, ranks: Ranks, capsys: Any, measured: Any
) -> None:
    folder = small_disk / "checkpoints"
    engine = StubEngine(count=10, size=16_000)  # 640 kB: two do not fit
    checkpoints = CheckpointManager(folder, KEEP, ranks, frozenset())
    checkpoints.save_and_wait(STATE, engine)
    free = shutil.disk_usage(small_disk).free
    checkpoints.save(replace(STATE, step=2), engine)
    while checkpoints.writer.is_saving:
        time.sleep(0.01)
    assert checkpoints.retry_due
    assert steps_in(folder) == [1] and verify_checkpoint(folder / "step-00000001") is None
    assert shutil.disk_usage(small_disk).free == free and not list(folder.glob("*.part"))
    measured("free space as before, old checkpoint verifies")
    with pytest.raises(
        InputError, match="cannot write to .*, 3 saves in a row failed \\(No space left"
    ):
        checkpoints.save_and_wait(replace(STATE, step=2), engine)
    assert "No space left on device; older ones are intact" in capsys.readouterr().out
    shutil.rmtree(folder)  # free space
    again = CheckpointManager(folder, KEEP, ranks, frozenset())
    again.save_and_wait(replace(STATE, step=2), engine)
    assert steps_in(folder) == [2]


def test_status(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a save, during it, after it, after a failed one, and after a restart."""
    checkpoints = CheckpointManager(tmp_path, KEEP, ranks, frozenset())
    assert checkpoints.status() == "no checkpoint yet"
    engine, gate, write = StubEngine(), Event(), CheckpointWriter._write
    monkeypatch.setattr(
        CheckpointWriter, "_write", lambda self, part: (gate.wait(), write(self, part))[1]
    )
    checkpoints.save(STATE, engine)
    assert checkpoints.status() == "no checkpoint yet, saving step 1"
    gate.set()
    assert checkpoints.wait()
    assert re.fullmatch(r"step 1 saved \d+ s ago", checkpoints.status())

    def full(self: CheckpointWriter, part: Path) -> Any:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(CheckpointWriter, "_write", full)
    checkpoints.save(replace(STATE, step=2), engine)
    assert not checkpoints.wait()
    expected = r"step 1 saved \d+ s ago, step 2 failed: No space left on device"
    assert re.fullmatch(expected, checkpoints.status())
    again = CheckpointManager(tmp_path, KEEP, ranks, frozenset())
    os.utime(tmp_path / "step-00000001" / "manifest.json", (time.time() - 7300,) * 2)
    again.load(tmp_path / "step-00000001", engine)
    assert again.status() == "step 1 saved 2 h ago"


def test_a_failed_save_is_tried_again_after_a_pause_that_doubles(
    tmp_path: Path, ranks: Ranks, monkeypatch: Any
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(writer_module, "write_tensors", _io_error)
    checkpoints = CheckpointManager(
        tmp_path, replace(KEEP, retry_seconds=10.0, max_failures=9), ranks, frozenset()
    )
    for pause in (10, 20, 40):
        checkpoints.save(STATE, StubEngine())
        checkpoints.writer.thread.join()  # type: ignore[union-attr]
        assert not checkpoints.retry_due
        clock[0] += pause - 1
        assert not checkpoints.retry_due
        clock[0] += 1
        assert checkpoints.retry_due


def test_the_last_save_pauses_for_a_bounded_time_and_shows_that_it_lives(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    beats: list[float] = []

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(writer_module, "write_tensors", _io_error)
    config = replace(KEEP, retry_seconds=60.0, max_failures=5)
    checkpoints = CheckpointManager(
        tmp_path, config, ranks, frozenset(), lambda: beats.append(clock[0])
    )
    with pytest.raises(InputError, match="5 saves in a row failed"):
        checkpoints.save_and_wait(STATE, StubEngine())
    assert clock[0] == 60 + 120 + 240 + 480
    assert max(later - beat for beat, later in pairwise(beats)) <= 1.0


def test_a_save_is_progress_of_the_loop_only_while_the_loop_waits_for_it(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[None] = []
    monkeypatch.setattr(progress_module, "EXCHANGE_SECONDS", 0.01)
    monkeypatch.setattr(writer_module, "WRITE_BYTES", 100)
    monkeypatch.setattr(writer_module, "SYNC_BYTES", 1000)
    sync, slow = os.fdatasync, Event()

    def slow_sync(descriptor: int) -> None:
        slow.wait(0.05)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow_sync)
    checkpoints = CheckpointManager(tmp_path, KEEP, ranks, frozenset(), lambda: beats.append(None))
    for step, is_awaited in ((1, False), (2, True)):
        checkpoints.save(replace(STATE, step=step), StubEngine())
        beats.clear()
        while not is_awaited and checkpoints.writer.is_saving:
            time.sleep(0.01)
        assert checkpoints.wait()
        assert bool(beats) == is_awaited
    assert steps_in(tmp_path) == [2, 1]


def test_a_file_of_tensors_is_a_safetensors_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written in pieces, with an empty tensor; also a file of a rank that owns nothing."""
    monkeypatch.setattr(writer_module, "WRITE_BYTES", 1000)
    monkeypatch.setattr(writer_module, "SYNC_BYTES", 3000)
    whole = {name: torch.randn(size) for name, size in (("b/1", 777), ("a", 0), ("a/2", 5000))}
    for number, tensors in enumerate((whole, {})):
        path, sizes = tmp_path / str(number), list[int]()
        entry = writer_module.write_tensors(path, tensors, sizes.append)
        assert entry == writer_module.manifest_entry(path)
        loaded = load_file(path)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        assert sum(sizes) >= path.stat().st_size and max(sizes) <= 1000


def _io_error(*arguments: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.fault("bit rot in a checkpoint", "named, renamed, and the one before is loaded")
def test_every_flipped_bit_is_detected(tmp_path: Path, ranks: Ranks, measured: Any) -> None:
    save_steps(tmp_path, ranks, steps=2)
    best = next(iter_checkpoints(tmp_path))
    rng = random.Random(0)
    flips = 0
    for path in sorted(best.iterdir()):
        data = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            assert not _loads_wrong_data(best), f"{path.name}: flip not detected"
            flips += 1
        path.write_bytes(data)
    measured(f"{flips} of {flips} flips detected")
    assert newest_valid(iter_checkpoints(tmp_path))[0] == best


def _loads_wrong_data(folder: Path) -> bool:
    """Whether a damaged checkpoint verifies although its files differ from the manifest.

    A flip in the manifest's white space changes nothing, so the checkpoint may verify.
    """
    if verify_checkpoint(folder) is not None:
        return False
    actual = {
        path.name: sha256_of(path) for path in folder.iterdir() if path.name != "manifest.json"
    }
    listed = {name: digest for name, (_, digest) in read_manifest(folder).items()}
    return actual != listed


def _save_and_die(folder: Path, point: int | None, offset: int | None) -> None:
    """Save step 2, killed at its n-th injection point or when a file reaches a size."""
    with init_distributed("cpu", 1) as ranks:
        injector = Injector(
            [] if point is None else [Fault("kill in save", 0, 0, point)], folder / "faults", 0
        )
        injector.now = 0
        if offset is not None:
            # Python ignores the signal, the default is a kill
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))
        engine = StubEngine(count=4)
        for tensor in engine.tensors.values():
            tensor.add_(1)
        CheckpointManager(folder / "checkpoints", KEEP, ranks, frozenset()).save_and_wait(
            replace(STATE, step=2), engine
        )


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 while a checkpoint is written", "the old one stays, or the new one is complete"
)
def test_a_kill_at_any_point_of_a_save_leaves_a_valid_checkpoint(
    tmp_path: Path, ranks: Ranks, measured: Any
) -> None:
    points = [(point, None) for point in range(1, WRITE_POINTS + 1)]
    offsets = [(None, offset) for offset in range(0, 16_000, 777)]
    old = new = 0
    for number, (point, offset) in enumerate(points + offsets):
        folder = tmp_path / str(number)
        save_steps(folder / "checkpoints", ranks)
        process = CONTEXT.Process(target=_save_and_die, args=(folder, point, offset))
        process.start()
        process.join()
        best, faults = newest_valid(iter_checkpoints(folder / "checkpoints"))
        assert faults == {} and best is not None
        is_new = best.name.endswith("2")
        expected = StubEngine(count=4 if is_new else 3)
        if is_new:
            new += 1
        else:
            old += 1
            assert best.name.endswith("1")
            assert process.exitcode in (-signal.SIGKILL, -signal.SIGXFSZ)
        shift = 1 if is_new else 0
        reader = CheckpointReader(best)
        for name, tensor in expected.tensors.items():
            assert torch.equal(reader.read_range("param", name, 0, 1, 0, 1000), tensor + shift)
    measured(f"{old + new} kills: {old} times the old one, {new} times the new one")
    assert old >= 20 and new >= 1


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


@pytest.mark.fault("a checkpoint made by somebody else", "refused, and nothing is executed")
@pytest.mark.parametrize(
    "name", ["rank-00000.safetensors", "rank-00000.json", "state.json", "manifest.json"]
)
def test_a_pickle_in_place_of_any_file_does_nothing(
    tmp_path: Path, ranks: Ranks, name: str, measured: Any
) -> None:
    save_steps(tmp_path / "c", ranks)
    folder, canary = next(iter_checkpoints(tmp_path / "c")), tmp_path / "canary"
    (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
    if name != "manifest.json":  # with a matching hash
        files = {
            path.name: writer_module.manifest_entry(path)
            for path in folder.iterdir()
            if path.name != "manifest.json"
        }
        writer_module.write_json(folder / "manifest.json", {"files": files})
    checkpoints = CheckpointManager(tmp_path / "c", KEEP, ranks, frozenset())
    try:
        checkpoint = checkpoints.find_latest()
        if checkpoint is not None:
            with pytest.raises(InputError, match="matches its manifest but cannot be loaded"):
                checkpoints.load(checkpoint, StubEngine())
    finally:
        assert not canary.exists()
    measured("no effect")


def test_the_pickle_has_an_effect_if_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_ls_verify_and_diff(tmp_path: Path, ranks: Ranks, capsys: Any) -> None:
    engine = save_steps(tmp_path / "run" / "checkpoints", ranks, steps=2)
    run = str(tmp_path / "run")
    assert inspect(["ls", run]) == 0
    assert "step-00000002" in capsys.readouterr().out
    assert inspect(["verify", run]) == 0
    assert inspect(["diff", run]) == 1  # the weights are equal, the steps are not
    out = capsys.readouterr().out
    assert "3 of 3 tensors are bit-identical" in out and "state differs in step, tokens" in out
    assert inspect(["diff", run, run]) == 0
    engine.tensors["layer.1"][5] += 0.25
    other = CheckpointManager(tmp_path / "other", KEEP, ranks, frozenset())
    other.save_and_wait(replace(STATE, step=2, tokens=200), engine)
    capsys.readouterr()
    assert inspect(["diff", run, str(tmp_path / "other")]) == 1
    out = capsys.readouterr().out
    assert "2 of 3 tensors" in out and "param layer.1" in out and "at most 2.50e-01" in out
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    assert inspect(["verify", run]) == 1
    assert "step-00000002: state.json has 2 bytes" in capsys.readouterr().out
    assert inspect(["ls", str(tmp_path / "nowhere")]) == 2


def test_verify_on_the_command_line(tmp_path: Path, ranks: Ranks) -> None:
    save_steps(tmp_path, ranks)
    done = python("train/checkpoints.py", "verify", tmp_path)
    assert done.returncode == 0 and "step-00000001: all files match the manifest" in done.stdout, (
        done.stderr
    )
