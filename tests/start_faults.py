"""Faults in files and settings that a rank finds when it begins, before its first step.

Such a fault is armed at its step, which ends the start by SIGKILL, and fires at the next one.
"""

import errno
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from core.run import RunFiles, iter_checkpoints
from model.kernels import cpu_library
from train.config import RunConfig
from train.resilience.run_lock import RunLock

# a start that these meet is refused with exit code 2; the next one goes on
REFUSED = ("ranks differ", "lock disk full")
NOISE = (  # lines that no reader of ours can use
    b'\xff\xfe{"step": 3\n',
    b"[1, 2]\n",
    b'{"tokens": "many"}\n',
    b"\0" * 512 + b"\n",
    b"[" * 5000 + b"\n",
    '{"text": "\u2028"}\n'.encode(),
)


def other_settings(run: RunConfig, detail: int, cache: Path) -> RunConfig:
    """Another learning rate, seed of the data or save interval on this rank alone."""
    if detail % 3 == 0:
        return replace(run, optim=replace(run.optim, lr=run.optim.lr * 1.5))
    if detail % 3 == 1:
        return replace(run, data=replace(run.data, seed=run.data.seed + 1))
    every = run.checkpoint.every_tokens * 2
    return replace(run, checkpoint=replace(run.checkpoint, every_tokens=every))


def lock_disk_full(run: RunConfig, detail: int, cache: Path) -> RunConfig:
    """No space for the lock of the run's folder."""

    def acquire(lock: RunLock) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    RunLock.acquire = acquire  # type: ignore[method-assign]
    return run


def torn_kernel_cache(run: RunConfig, detail: int, cache: Path) -> RunConfig:
    """A compiled library that a power cut left empty, cut or with another byte."""
    usual = cpu_library._cache_folder()
    if usual is not None and usual.is_dir():
        shutil.copytree(usual, cache / "falcon_mamba", dirs_exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    cpu_library.load_library.cache_clear()  # of the process that this rank is a fork of
    for library in cache.rglob("*.so"):
        content = library.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        library.write_bytes((b"", content[:middle], flipped)[detail % 3])
    return run


def damaged_records(run: RunConfig, detail: int, cache: Path) -> RunConfig:
    """Small records of the run that a crash left empty, cut or full of noise."""
    files = run.run.files
    files.heartbeats.mkdir(exist_ok=True)
    content = (b"", b'{"code": 0, "rea', NOISE[detail % len(NOISE)])[detail % 3]
    for path in (files.starts, files.outcome, files.heartbeats / "rank-00001.json"):
        path.write_bytes(content)
    return run


def noisy_lines(run: RunConfig, detail: int, cache: Path) -> RunConfig:
    """Foreign lines in the middle of the logs of the run, and a torn one at their end."""
    for path in (run.run.files.metrics, run.run.files.incidents):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        random.Random(detail).shuffle(noise := list(NOISE))
        lines.insert(len(lines) // 2, b"".join(noise))
        path.write_bytes(b"".join(lines) + b'{"step": 12, "tokens": 48')
    return run


def stray_files(run: RunConfig, detail: int, cache: Path) -> RunConfig:
    """A copy of a checkpoint under a later step, and files with the names of folders."""
    checkpoints = RunFiles(run.run.folder).checkpoints
    newest = next(iter_checkpoints(checkpoints), None)
    checkpoints.mkdir(parents=True, exist_ok=True)
    if newest is not None:
        shutil.copytree(newest, checkpoints / "step-00009999", dirs_exist_ok=True)
        shutil.copytree(newest, checkpoints / f"{newest.name} (copy)", dirs_exist_ok=True)
    for name in ("step-00000050.part", "x.part", "step-00000001"):
        if not (checkpoints / name).exists():
            (checkpoints / name).touch()
    return run


def damage(folder: Path, detail: int) -> bool:
    """Damage a file of the newest checkpoint: flip a bit, truncate it or remove it.

    Returns whether there is a checkpoint.
    """
    newest = next(iter_checkpoints(folder), None)
    if newest is None:
        return False
    files = sorted(path for path in newest.iterdir() if path.is_file())
    path = files[detail % len(files)]
    data = bytearray(path.read_bytes())
    action = detail // len(files) % 3
    if action == 0:
        data[detail * 7919 % len(data)] ^= 1 << (detail % 8)
        path.write_bytes(data)
    elif action == 1:
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    return True


# the arguments are the config, the fault's detail, and a folder for a cache
START_FAULTS: dict[str, Callable[[RunConfig, int, Path], RunConfig]] = {
    "ranks differ": other_settings,
    "lock disk full": lock_disk_full,
    "kernel cache torn": torn_kernel_cache,
    "records damaged": damaged_records,
    "noise in logs": noisy_lines,
    "stray files": stray_files,
}
ON_FIRST_RANK = ("lock disk full", "records damaged", "noise in logs", "stray files")
