"""metrics.jsonl over restarts, kills and damage: which lines stay, which are cut, what is said."""

import json
import os
import tracemalloc
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from core.errors import InputError
from core.files import TEMP_SUFFIX, append_json_line
from train.checkpoint.writer import CheckpointWriter
from train.metrics import records
from train.metrics.records import COPY_BYTES, JsonLines, read_lines, read_scores
from train.resilience.incidents import Incidents, sync_records
from train.resilience.progress import Progress


def line(step: int, **extra: Any) -> bytes:
    """A step's line of metrics.jsonl, of ten tokens per step."""
    figures = {"loss": 1.5, "source_loss": {}, "grad_norm": 1.0, "skipped": False, "stage": "a"}
    return json.dumps({"step": step, "tokens": 10 * step, **figures, **extra}).encode() + b"\n"


def scores(step: int) -> bytes:
    row = {"step": step, "tokens": 10 * step, "scores": {"suite": {"average": 50.0}}}
    return json.dumps(row).encode() + b"\n"


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_lines(path)]


DAMAGED = {
    "cut short": line(2)[:40] + b"\n",
    "not UTF-8": line(2).replace(b"a", b"\xff"),
    "a list": b"[1, 2]\n",
    "null": b"null\n",
    "text for tokens": line(2, tokens="x"),
    "NaN for tokens": line(2).replace(b": 20", b": NaN"),
    "a float for tokens": line(2, tokens=20.0),
    "a bool for tokens": line(2, tokens=True),
    "negative tokens": line(2, tokens=-1),
    "too many tokens": line(2, tokens=2**63),
    "digits without end": line(2).replace(b": 20", b": " + b"9" * 10_000),
    "no tokens": b'{"step": 2, "loss": 1.0}\n',
    "an infinite loss": line(2).replace(b"1.5", b"1e999"),
    "a mistyped loss": line(2, loss=[1.5]),
    "scores without suites": line(2, scores=3),
    "nesting without end": b"[" * 100_000 + b"\n",
    "zeros of a power cut": b"\0" * 4096 + b"\n",
    "a line of 17 MB": b" " * (17 * 2**20) + b"\n",
    "a surrogate": line(2, stage="\udc80"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_line_costs_only_itself_and_stays(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = line(1) + DAMAGED[kind] + line(3)
    path.write_bytes(kept + line(4))
    incidents = Incidents(tmp_path)
    file = JsonLines(path, 30, lambda text: incidents.log("damaged record", text))
    file.write(json.loads(line(4, loss=2.5)))
    file.close()
    assert path.read_bytes() == kept + line(4, loss=2.5)
    assert steps(path) == [1, 3, 4]
    (cut,) = tmp_path.glob("metrics.cut-30-*.jsonl")
    assert cut.read_bytes() == line(4)
    (incident,) = map(json.loads, incidents.path.read_text().splitlines())
    assert incident["text"].startswith(f"{path}: 1 damaged line is not read (line 2): ")
    reports = [text for text in capsys.readouterr().out.splitlines() if "not read" in text]
    assert len(reports) == 1, "every reader reported it again"


def test_lines_are_separated_by_line_feeds_only(tmp_path: Path) -> None:
    """U+2028 and other line ends of str.splitlines are allowed inside JSON strings."""
    path = tmp_path / "metrics.jsonl"
    stage = "a\u2028b\u0085c"
    raw = line(1, stage=stage).replace(b"\\u2028", "\u2028".encode())
    path.write_bytes(raw + b"\n" + line(2).replace(b"\n", b"\r\n"))
    assert [record["stage"] for record in read_lines(path)] == [stage, "a"]


def test_byte_order_mark_costs_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(1) + line(2))
    assert steps(path) == [2]


@pytest.mark.parametrize("end", [line(2)[:-1], line(2)[:30], b"\0" * 64])
def test_next_record_is_not_glued_to_a_torn_one(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + end)
    file = JsonLines(path, 20)
    file.write(json.loads(line(3)))
    file.close()
    assert path.read_bytes() == line(1) + end + b"\n" + line(3)
    assert steps(path) == ([1, 2, 3] if end == line(2)[:-1] else [1, 3])


@pytest.mark.parametrize("content", [None, b"", b"\n\n"])
def test_nothing_to_cut_changes_nothing(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    JsonLines(path, 0).close()
    assert path.read_bytes() == (content or b"")
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_scores_of_earlier_checkpoints_stay_in_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2) + line(3) + scores(2) + line(4) + scores(4))
    JsonLines(path, 20).close()
    assert path.read_bytes() == line(1) + line(2) + scores(2)
    assert [record["step"] for record in read_scores(path)] == [2]
    (cut,) = tmp_path.glob("metrics.cut-20-*.jsonl")
    assert cut.read_bytes() == line(3) + line(4) + scores(4)


@pytest.mark.parametrize("crash_at", range(6))
def test_crash_while_cutting_loses_and_repeats_nothing(tmp_path: Path, crash_at: int) -> None:
    """Die before the n-th rename or sync of a cut; the next start ends as an undisturbed one."""
    path = tmp_path / "metrics.jsonl"
    before = line(1) + line(2) + line(3)
    path.write_bytes(before)
    calls = iter(range(100))

    def maybe_crash(real: Any) -> Any:
        def call(*args: Any) -> Any:
            if next(calls) == crash_at:
                raise KeyboardInterrupt
            return real(*args)

        return call

    with (
        mock.patch.object(os, "fsync", maybe_crash(os.fsync)),
        mock.patch.object(Path, "replace", maybe_crash(Path.replace)),
        pytest.raises(KeyboardInterrupt),
    ):
        records.cut_off(path, 10)
    cuts = list(tmp_path.glob("metrics.cut-*.jsonl"))
    assert path.read_bytes() == before or cuts[0].read_bytes() == line(2) + line(3)
    records.cut_off(path, 10)
    (cut,) = tmp_path.glob("metrics.cut-*.jsonl")
    assert (path.read_bytes(), cut.read_bytes()) == (line(1), line(2) + line(3))
    assert not list(tmp_path.glob(f"*{TEMP_SUFFIX}"))


def test_two_cuts_at_one_position_keep_both(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for loss in (2.0, 3.0):
        path.write_bytes(line(1) + line(2, loss=loss))
        records.cut_off(path, 10)
    cuts = {cut.read_bytes() for cut in tmp_path.glob("metrics.cut-10-*.jsonl")}
    assert cuts == {line(2, loss=2.0), line(2, loss=3.0)}


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(map(line, range(20_000))))
    read_lines(path)  # builds what is cached
    tracemalloc.start()
    JsonLines(path, 100_000).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(read_lines(path)), path.stat().st_size > 10**6) == (10_001, True)
    assert peak < 5 * COPY_BYTES, f"{peak / 2**20:.1f} MiB for 2.4 MB"


def test_records_are_synced_before_the_checkpoint_is_committed(tmp_path: Path) -> None:
    order: list[str] = []
    part = tmp_path / "step-00000001.part"
    part.mkdir()
    writer: Any = SimpleNamespace(
        folder=tmp_path, before_commit=lambda on_sync: order.append("records"), progress=Progress()
    )
    with (
        mock.patch.object(Path, "rename", lambda path, new: order.append(new.name)),
        mock.patch("train.checkpoint.writer.fsync", lambda folder: order.append("folder")),
    ):
        CheckpointWriter._commit(writer, part, {}, {}, lambda: order.append("old ones"))
    assert order == ["records", "folder", "step-00000001", "folder", "old ones"]


def test_no_more_than_two_syncs_of_a_commit_are_without_progress(tmp_path: Path) -> None:
    """Syncs of a slow disk add up to the watchdog's limit where no beat is between them."""
    JsonLines(tmp_path / "metrics.jsonl", 0).close()
    Incidents(tmp_path).log("note", "of a run")
    part = tmp_path / "checkpoints" / "step-00000001.part"
    part.mkdir(parents=True)
    calls: list[str] = []
    progress = SimpleNamespace(add=lambda amount=1: calls.append("beat"))
    records = partial(sync_records, tmp_path)
    writer: Any = SimpleNamespace(folder=part.parent, before_commit=records, progress=progress)
    with mock.patch.object(os, "fsync", lambda descriptor: calls.append("sync")):
        CheckpointWriter._commit(writer, part, {}, {}, lambda: None)
    runs = [len(list(group)) for call, group in groupby(calls) if call == "sync"]
    assert sum(runs) == 9 and max(runs) == 2, calls


def test_failed_sync_of_records_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sync_records(tmp_path, lambda: None)  # nothing is written yet
    file = JsonLines(tmp_path / "metrics.jsonl", 0)
    synced: list[int] = []
    with mock.patch.object(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino)):
        sync_records(tmp_path, lambda: None)
    assert synced == [path.stat().st_ino for path in (file.path, tmp_path)]
    with mock.patch.object(os, "fsync", side_effect=OSError("gone")):
        sync_records(tmp_path, lambda: None)
        file.close()
    assert caplog.messages == [
        "cannot sync metrics.jsonl and incidents.jsonl: gone",
        "cannot sync metrics.jsonl: gone",
    ]


def test_folder_in_place_of_the_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    for tokens in (0, None):
        with pytest.raises(InputError, match=r"metrics.jsonl cannot be .*: move it away"):
            JsonLines(path, tokens)


def test_appended_line_ends_a_torn_one_and_holds_any_text(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"
    path.write_bytes(b'{"a": ')
    append_json_line(path, {"text": "\udcff \u2028"}, sync=True)
    append_json_line(path, {"text": "b"})
    head, *lines = path.read_bytes().split(b"\n")
    assert head == b'{"a": '
    assert lines == [b'{"text": "? \\u2028"}', b'{"text": "b"}', b""]


def test_close_counts_records_that_never_reached_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(JsonLines, "MAX_WAITING", 3)
    file = JsonLines(tmp_path / "metrics.jsonl", 0)
    with mock.patch.object(JsonLines, "_append", side_effect=OSError("full")):
        for step in range(5):
            file.write({"step": step})
    file.close()
    printed = capsys.readouterr().out
    assert "3 lines of metrics.jsonl had no room" in printed
    assert "lost 2 lines of metrics.jsonl" in printed
