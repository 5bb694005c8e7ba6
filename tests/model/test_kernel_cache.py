"""A compiled library is loaded only if it is whole and ours; a compiler's error is one line."""

import ctypes
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model.kernels import CPU, REFERENCE, cpu_library, identity

Load = Callable[[], ctypes.CDLL]
# stands for g++: counts its calls, and makes a library at once
COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo "fake 1"; exit; }
echo >> "$0.calls"
while [ "$1" != -o ]; do shift; done
echo 'int answer(void) { return 42; }' | gcc -shared -fPIC -x c - -o "$2"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    mask = os.umask(0)  # the cache must be safe under every mask
    yield path
    os.umask(mask)


def load(compiler: Path) -> int:
    """Load the library as a new process does; returns how often it has been compiled."""
    cpu_library.library_key.cache_clear()
    assert cpu_library.load_library.__wrapped__("portable").answer() == 42
    cpu_library.library_key.cache_clear()
    return compiler.with_suffix(".calls").read_text().count("\n")


def library(folder: Path) -> Path:
    """The only file of the cache below a folder."""
    (path,) = (folder / "falcon_mamba").iterdir()
    return path


def replace(path: Path, content: bytes) -> None:
    """Write a new file: this process has the old one mapped, and runs code of it at its exit."""
    mode = path.stat().st_mode
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)


def cut(path: Path, size: int) -> None:
    replace(path, path.read_bytes()[:size])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, content)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: cut(path, path.stat().st_size * 9 // 10),
        flip,
        link,
        pipe,
        lambda path: cut(path, 0),
        lambda path: cut(path, -cpu_library.HASH_BYTES),
        lambda path: path.chmod(0o666),
    ],
    ids=["cut", "flipped", "link", "pipe", "empty", "no hash", "writable by others"],
)
def test_a_damaged_library_is_rebuilt(
    compiler: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    assert load(compiler) == load(compiler) == 1
    damage(library(tmp_path / "cache"))
    assert load(compiler) == load(compiler) == 2


def test_another_users_library_is_rebuilt(compiler: Path, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root to give a file to another user")
    load(compiler)
    os.chown(library(tmp_path / "cache"), 65534, 65534)
    assert load(compiler) == load(compiler) == 2


def test_a_folder_that_is_not_safe_is_not_used(
    compiler: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "other").mkdir()
    folder = tmp_path / "cache" / "falcon_mamba"
    folder.symlink_to(tmp_path / "other")
    assert load(compiler) == 1 and not any((tmp_path / "other").iterdir())
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    assert load(compiler) == 2 and not any(folder.iterdir())
    folder.rmdir()
    folder.touch()
    assert load(compiler) == 3
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert all("set XDG_CACHE_HOME" in line and "\n" not in line for line in messages)


@pytest.mark.parametrize("value", ["", "relative"])
def test_a_cache_home_that_does_not_count(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.chdir(tmp_path)
    load(compiler)
    assert library(tmp_path / ".cache").is_file()
    assert not (tmp_path / "falcon_mamba").exists() and not (tmp_path / "relative").exists()


def test_without_a_home_each_process_compiles(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    assert load(compiler) == 1
    assert load(compiler) == 2


@pytest.mark.parametrize(
    "action, message",
    [
        ("echo 'a note'; echo 'x.cpp:1: error: no such thing' >&2; exit 1", "error: no such thing"),
        ("echo 'as: out.s: No space left on device' >&2; exit 1", "No space left on device"),
        ("exit 3", "it failed without a message"),
        ("kill -9 $$", "killed by SIGKILL"),
        ("sleep 600 & wait", "did not end in 1 s"),
    ],
)
def test_a_failed_compilation_is_one_line(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, action: str, message: str
) -> None:
    monkeypatch.setattr(cpu_library, "COMPILE_SECONDS", 1)
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\n{action}\n')
    with pytest.raises(RuntimeError, match=re.escape(message)) as error:
        load(compiler)
    assert "\n" not in str(error.value)


def test_a_cache_that_is_full_is_said(
    compiler: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cpu_library, "write_atomic", full)
    assert load(compiler) == 1
    assert load(compiler) == 2 and not any((tmp_path / "cache" / "falcon_mamba").iterdir())
    (line, _) = (record.getMessage() for record in caplog.records)
    assert "No space left on device" in line and "set XDG_CACHE_HOME" in line


def test_a_temporary_folder_that_cannot_be_used_is_said(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    cpu_library.load_library.cache_clear()
    reason = cpu_library.unavailable_reason()
    cpu_library.load_library.cache_clear()
    cpu_library.library_key.cache_clear()
    assert reason is not None and "/no/such/folder" in reason and "TMPDIR" in reason


def test_identity_names_what_decides_results() -> None:
    ours = identity(CPU, "cpu")
    assert ours["backend"] == "cpu" and re.fullmatch("[0-9a-f]{64}", ours["library"])
    assert cpu_library.instruction_set() in ours["instructions"]
    theirs = identity(REFERENCE, "cpu")
    assert theirs["library"] == f"torch {torch.__version__}"
