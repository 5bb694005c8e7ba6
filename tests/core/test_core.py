"""core/: atomic writes, order of checkpoints."""

import errno
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from core import files
from core.entry import explain_missing_extras
from core.errors import InputError
from core.files import (
    check_folder,
    copy_file,
    make_folder,
    move_into,
    publish_folder,
    remove_stale_temp_files,
    write_atomic,
    write_json,
    write_text,
)
from core.run import RunFiles, iter_checkpoints, iter_committed_checkpoints


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(file: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_only_an_unsupported_folder_sync_is_ignored(tmp_path: Path) -> None:
    def fail_for_folders(error_number: int) -> mock._patch:
        real_fsync = os.fsync

        def fsync(descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(error_number, os.strerror(error_number))
            real_fsync(descriptor)

        return mock.patch.object(files.os, "fsync", fsync)

    with fail_for_folders(errno.EINVAL):
        write_text(tmp_path / "a", "text")
    with fail_for_folders(errno.EIO), pytest.raises(OSError, match="rror"):
        write_text(tmp_path / "b", "text")


def test_temporary_files_are_removed_after_an_hour(tmp_path: Path) -> None:
    for name in ("a.json.node-1.part", "b.json.node-2.part"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "a.json.node-1.part", (0, time.time() - 4000))
    (tmp_path / "hf.part").mkdir()
    remove_stale_temp_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["b.json.node-2.part", "hf.part"]


def test_a_folder_without_links_or_renames_is_refused(tmp_path: Path) -> None:
    refusal = OSError(errno.EPERM, "Operation not permitted")
    check_folder(tmp_path, "run.dir", links=True)
    with mock.patch.object(os, "link", side_effect=refusal):
        check_folder(tmp_path, "data.folder")
        with pytest.raises(InputError, match=r"run.dir .* without hard links and renames"):
            check_folder(tmp_path, "run.dir", links=True)
    with (
        mock.patch.object(Path, "rename", side_effect=refusal),
        pytest.raises(InputError, match=r"data.folder .* without renames .*set it to another"),
    ):
        check_folder(tmp_path, "data.folder")
    assert not list(tmp_path.iterdir())


def test_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    checkpoints = RunFiles(tmp_path).checkpoints
    for step in (9, 10, 100_000_000, 28):
        (checkpoints / f"step-{step:08d}").mkdir(parents=True)
    for step in (9, 10):
        (checkpoints / f"step-{step:08d}" / "manifest.json").touch()
    for other in ("step-00000099.part", "step-00000098.damaged-1", "step-7"):
        (checkpoints / other).mkdir()
    assert [path.name for path in iter_checkpoints(checkpoints)] == [
        "step-100000000", "step-00000028", "step-00000010", "step-00000009"
    ]  # fmt: skip
    assert [path.name for path in iter_committed_checkpoints(checkpoints)] == [
        "step-00000010",
        "step-00000009",
    ]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_published_folder_replaces_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:  # as on a file system without it
        monkeypatch.setattr(files, "_exchange", lambda *folders: False)
    part, final = tmp_path / "x.part", tmp_path / "new" / "x"
    for text in ("first", "second"):
        make_folder(part / "inner")
        write_text(part / "inner" / "file", text)
        publish_folder(part, final)
        assert (final / "inner" / "file").read_text() == text
        assert os.listdir(tmp_path) == ["new"] and os.listdir(final.parent) == ["x"]


def test_every_new_folder_is_synced_into_its_parent(tmp_path: Path) -> None:
    synced: list[Path] = []
    with mock.patch.object(files, "fsync", synced.append):
        make_folder(tmp_path / "a" / "b")
        make_folder(tmp_path / "a" / "b")
        assert synced == [tmp_path, tmp_path / "a"]
        write_text(tmp_path / "c", "text")
        move_into(tmp_path / "a" / "b", [tmp_path / "c"])
    assert set(synced[-2:]) == {tmp_path, tmp_path / "a" / "b"}
    copy_file(tmp_path / "a" / "b" / "c", tmp_path / "d")
    assert (tmp_path / "d").read_text() == "text" and not (tmp_path / "c").exists()


def test_an_error_of_a_file_system_sync_is_raised(tmp_path: Path) -> None:
    files.sync_filesystem(tmp_path)
    with mock.patch.object(files.ctypes, "CDLL") as library, pytest.raises(OSError):
        library.return_value.syncfs.return_value = -1
        files.sync_filesystem(tmp_path)


def test_a_users_error_is_one_line_in_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    explain_missing_extras()
    for error in (InputError("config.yaml is damaged"), FileNotFoundError(2, "Absent", "x")):
        with pytest.raises(SystemExit) as ended:
            sys.excepthook(type(error), error, None)
        assert ended.value.code == 2 and capsys.readouterr().err == f"error: {error}\n"
