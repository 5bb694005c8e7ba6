"""Damaged files of ours: each reader reads the file, or names it in one line; nothing else happens.

Mutations are drawn with a fixed seed, so that a failure repeats.
"""

import gzip
import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from core import records
from core.errors import InputError
from core.old_keys import read_record
from core.run import Run, RunFiles
from core.sweep import SWEEP, read_points
from data.pipeline import accounting, fingerprints
from data.readers.listing import INPUT_LIST, read_pinned
from data.recipes.decontamination import evaluation_ngrams
from data.recipes.urls import BlocklistFilter
from data.stream.documents import read_clean
from eval.config import JobsConfig, Launcher
from eval.leaderboard.jobs import SuiteJobs
from eval.leaderboard.stored import read_stored
from launch.collect import run_results
from launch.slurm.attempts import consecutive_crashes, excluded_nodes, read_attempts, record_end
from train.metrics.page import event_rows, fact_rows, planned_mixture, start_rows
from train.metrics.records import JsonLines, read_lines, read_scores
from train.resilience.incidents import Incidents, Outcome, Starts, describe_state, read_outcome

STEP = {
    "step": 1,
    "tokens": 10,
    "loss": 1.5,
    "source_loss": {"web": 1.5},
    "source_tokens": {"web": 10},
    "grad_norm": 1.0,
    "skipped": False,
    "stage": "a",
    "validation": {"web": {"loss": 1.25}},
}
SCORES = {"step": 1, "tokens": 10, "scores": {"suite": {"average": 50.0}}}
TIME = "2026-11-01T00:00:00Z"
ROW = {"row": {"label": "ARC"}, "score": 50.0, "stderr": None}
COUNTS = {"name": "reader", "total": 3, "forwarded": 2, "dropped": {"empty": 1}}
HELDOUT = dict.fromkeys(("tokens", "bytes", "loss", "bits_per_byte", "unigram_bits_per_byte"), 1)
START = {
    "time": TIME,
    "tokens": 10,
    "ranks": 2,
    "code": {"commit": "abc", "dirty": False},
    "versions": {"torch": "2"},
    "decisive": {"optim.lr": [1, 2]},
}


def use_metrics(path: Path) -> None:
    JsonLines(path, 10).close()
    run_results(path.parent)
    read_scores(path)
    fact_rows(path.parent, {}, read_lines(path))


def use_attempts(path: Path) -> None:
    consecutive_crashes(path.parent, "")
    event_rows(path.parent)
    record_end(path.parent, 1, 3, path.with_name("bad_nodes.txt"))


def use_incidents(path: Path) -> None:
    event_rows(path.parent)
    Starts(path.parent, 0).count(10, Incidents(path.parent))


def use_outcome(path: Path) -> None:
    describe_state(path.parent)
    outcome = read_outcome(path.parent)
    assert outcome in (None, Outcome(75, "stopped")) or outcome.code == 75


def use_evaluation(path: Path) -> None:
    RunFiles(path.parent).metrics.write_bytes(encode("metrics.jsonl", [STEP]))
    run_results(path.parent)


def use_counts(path: Path) -> None:
    with suppress(AssertionError):  # of numbers that fit the schema and do not add up
        accounting.read_counts(path.parent, 1)


def use_jobs(path: Path) -> None:
    settings = JobsConfig(["v1"], 100, Launcher.local, [], [])
    SuiteJobs(Run("r", str(path.parent.parent), 0), settings).poll(now=True)


def use_config(path: Path) -> None:
    record = read_record(path)
    planned_mixture(record)
    start_rows(record)
    fact_rows(path.parent, record, [])


# file -> content and what reads it; a list of values is a JSON Lines file
KINDS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "metrics.jsonl": ([STEP, SCORES], use_metrics),
    "incidents.jsonl": ([{"time": TIME, "incident": "crash", "text": "rank 0"}], use_incidents),
    "attempts.jsonl": (
        [
            {"time": TIME, "event": "end", "reason": "crash", "crashed_at": ""},
            {"time": TIME, "event": "begin", "nodes": ["n1"]},
        ],
        use_attempts,
    ),
    "outcome.json": ({"outcome": "interrupted", "code": 75, "reason": "stopped"}, use_outcome),
    "starts.json": (
        {"tokens": 10, "starts": 1},
        lambda path: Starts(path.parent, 5).count(10, Incidents(path.parent)),
    ),
    "scores/jobs.json": ({"started": {"step-00000004": 10}}, use_jobs),
    "scores/v1-step-00000004.json": (
        {"suite": "v1", "complete": True, "rows": {"ARC": ROW}, "missing": {}},
        lambda path: read_stored(path, "it is left out"),
    ),
    "eval.json": (
        {"checkpoint": "step-00000004", "heldout": {"all": HELDOUT}, "sample": "a"},
        use_evaluation,
    ),
    SWEEP: ({"points": {"lr-1": {"optim.lr": "1"}}}, lambda path: read_points(path.parent)),
    "config.yaml": (
        {
            "code": START["code"],
            "history": [START],
            "data": {"stages": [{"name": "a", "mixture": {"web": 1.0}}]},
        },
        use_config,
    ),
    fingerprints.BUILT: (
        {"key": "k", "files": {"a": 1}, "steps": [COUNTS], "input": ["jsonl", {"a": 1}]},
        lambda path: fingerprints.read_built(path.parent, fingerprints.BuiltClean, "k"),
    ),
    "locks/web.json": (
        {"tasks": 2},
        lambda path: fingerprints.check_num_tasks(path.parent.parent, "web", 2),
    ),
    INPUT_LIST: ({"kind": "jsonl", "files": ["a"]}, lambda path: read_pinned(path.parent)),
    "stats/00000.json": (
        [{"name": "reader", "stats": {"total": 2, "doc_len": {"total": 3}, "forwarded": 2}}],
        use_counts,
    ),
    "bad_nodes.txt": (["n1 now run reason"], lambda path: excluded_nodes(path, 1)),
}


def encode(name: str, content: Any) -> bytes:
    if name == "bad_nodes.txt":
        return "\n".join(map(str, content)).encode(errors="replace") + b"\n"
    if name == "config.yaml":
        return yaml.safe_dump(content).encode()
    if name.endswith(".jsonl"):
        return "".join(json.dumps(line) + "\n" for line in content).encode()
    return json.dumps(content).encode()


def paths_of(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a value."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from paths_of(value, (*at, key))


WRONG = (
    None, True, -1, 2**70, 1.5, float("nan"), float("inf"), 10**400, "", "x\n\u2028y", "\udc80", [],
    [[1]], {}, {"a": {"b": 1}}, {"": None},
)  # fmt: skip


def mutate(name: str, content: Any, draw: random.Random) -> bytes:
    """The bytes of a file with one mutation."""
    content = json.loads(json.dumps(content))
    kind = draw.choice(["drop", "wrong", "wrong", "wrong", "add", "bytes", "cut", "text"])
    raw = encode(name, content)
    if kind in ("drop", "wrong", "add"):
        *parents, key = draw.choice(list(paths_of(content)))
        parent = content
        for each in parents:
            parent = parent[each]
        if kind == "drop":
            del parent[key]
        elif kind == "wrong":
            parent[key] = draw.choice(WRONG)
        elif isinstance(parent, dict):
            parent["unknown"] = draw.choice(WRONG)
        return encode(name, content)
    if kind == "bytes":
        position = draw.randrange(len(raw))
        return raw[:position] + bytes([draw.randrange(256)]) + raw[position + 1 :]
    if kind == "cut":
        return raw[: draw.randrange(len(raw))]
    noise = [b"\0" * 64, b"\xff\xfe", b"[" * 100_000, b"{}", b"null", b"9" * 5000, b"\xef\xbb\xbf"]
    noise += [b'{"a":' * 5000, b"\n\r\n", b"- " * 3000, b"a: &a [*a]", b"a: ${b"]
    part = draw.choice(noise)
    return draw.choice([part, part + raw, raw + part])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("no_jobs")
def test_damaged_file_is_read_or_named_in_one_line(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, use = KINDS[name]
    draw = random.Random(f"{name} 20261130")
    said = 0
    for number in range(40 if name == "config.yaml" else 150):
        monkeypatch.setattr(records, "_reported", set())
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        before = mutate(name, content, draw)
        path.write_bytes(before)
        caplog.clear()
        try:
            use(path)
        except InputError as error:
            caplog.handler.emit(logging.makeLogRecord({"msg": str(error)}))
        texts = [record.getMessage() for record in caplog.records]
        texts = [text for text in texts if path.name in text and "strike against" not in text]
        assert len(texts) <= 1 + (name == "metrics.jsonl"), texts
        assert all("\n" not in text and str(path) in text for text in texts), texts
        said += bool(texts)
        if name.endswith((".jsonl", ".txt")):
            assert path.read_bytes().startswith(before), "a damaged file was rewritten"
    assert said > number / 5, "too few mutations are damage"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("no_jobs")
def test_whole_file_is_read_without_a_word(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, use = KINDS[name]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(name, content))
    use(path)
    assert not [text for text in caplog.messages if str(path) in text and "strike" not in text]


NO_FILES: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("no_jobs")
def test_what_is_no_file_is_one_line(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    NO_FILES[kind](path)
    if name == "scores/jobs.json":
        return KINDS[name][1](path)  # a warning: training continues without jobs
    with pytest.raises(InputError, match=name) as refused:
        KINDS[name][1](path)
    assert "\n" not in str(refused.value)


@pytest.fixture
def no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SuiteJobs, "_launch", lambda self, suite, pinned: None)


@pytest.mark.parametrize("code", [True, False, 0.0, 1, 76, "0", None, -1, 10**30])
def test_outcome_with_another_code_has_not_finished(tmp_path: Path, code: Any) -> None:
    path = RunFiles(tmp_path).outcome
    path.write_text(json.dumps({"outcome": "finished", "code": code, "reason": "finished"}))
    assert read_outcome(tmp_path) is None
    assert describe_state(tmp_path) == "unknown: outcome.json is damaged"
    path.unlink()
    assert describe_state(tmp_path) == "running or crashed"


def test_good_lines_of_attempts_and_nodes_survive(tmp_path: Path) -> None:
    begin = {"time": TIME, "event": "begin", "nodes": ["n1"]}
    lines = [json.dumps(begin).encode(), b'{"event": "begin"', b"\xff", b"[1]", b'{"event": "x"}']
    RunFiles(tmp_path).attempts.write_bytes(b"\n".join([*lines, lines[0]]))
    assert read_attempts(tmp_path) == [begin, begin]
    nodes = tmp_path / "bad_nodes.txt"
    nodes.write_bytes(b"# by hand\nn1 now\n\xff\xfe now\n--x;rm now\n\nn1\nn2 later\0")
    assert excluded_nodes(nodes, 1) == ["n1", "n2"] and excluded_nodes(nodes, 2) == ["n1"]


def test_damaged_list_of_jobs_starts_none_twice(tmp_path: Path) -> None:
    jobs = SuiteJobs(Run("r", str(tmp_path), 0), JobsConfig(["v1"], 1, Launcher.local, [], []))
    jobs.record.parent.mkdir()
    jobs.record.write_text("{")
    jobs._due = lambda started: pytest.fail("it looked for jobs")  # type: ignore[method-assign]
    assert jobs.poll(now=True) == [] and jobs.record.read_text() == "{"


@pytest.mark.parametrize("raw", [b"[1]\n", b"{}\n", b"\xff\n", b"[" * 10**5, None])
def test_damaged_clean_documents_are_one_line(tmp_path: Path, raw: bytes | None) -> None:
    path = tmp_path / "00000.jsonl.gz"
    good = b'{"text": "a"}\n'
    path.write_bytes(gzip.compress(good * 2)[:-9] if raw is None else gzip.compress(good + raw))
    rows = read_clean(path)
    assert next(rows) == {"text": "a"}
    with pytest.raises(InputError, match=r"00000.jsonl.gz is damaged \(.*prepare the data again"):
        list(rows)


def test_users_lists_that_are_not_utf8_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="list.txt is not UTF-8"):
        BlocklistFilter(str(path))
    for line in (b"\xff\n", b"[" * 10**5):
        path.write_bytes(line)
        with pytest.raises(InputError, match="list.txt:1 is not JSON"):
            evaluation_ngrams(str(path))
        evaluation_ngrams.cache_clear()
