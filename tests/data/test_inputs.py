"""Folders as they are in the world: every file is read or named, every row kept or dropped."""

import gzip
import io
import json
import os
from pathlib import Path

import pyarrow
import pytest

from core.errors import InputError
from data import tokenizer
from data.config import DataConfig, Source, Stage, TokenizerConfig
from data.pipeline import accounting, clean
from data.pipeline.clean import Build
from data.prepare import prepare
from data.readers import listing
from data.readers.listing import data_suffix, kind_of, list_raw_files
from data.recipes.extraction import MainTextExtractor
from data.stream.manifests import read_manifest, source_folder
from examples.demo_corpus.archives import write_archive
from tests.data.samples import PROSE
from tests.data.test_readers import PACK, damage_group, read, write_parquet
from tests.data.test_recipes import NO_ASSETS, make_source, run_recipe

PAGE = f"<html><head><title>R</title></head><body><article><p>{PROSE}</p></article></body></html>"


def prose(name: str) -> str:
    """Text that every recipe here keeps, different for every name."""
    return f"{PROSE}The keeper of {name} wrote it down, and the others read it in the evening."


def line(name: str) -> bytes:
    return json.dumps({"id": name, "text": prose(name)}).encode() + b"\n"


def write_world(folder: Path) -> dict[str, tuple[int, dict[str, int]]]:
    """Write files of many kinds; returns (documents, dropped rows) of those that are read."""
    expected: dict[str, tuple[int, dict[str, int]]] = {}

    def add(name: str, content: bytes, documents: int, **dropped: int) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        expected[name] = documents, dropped

    add("notes.txt", prose("txt").encode(), 1)
    add("NOTES.TXT", prose("capitals").replace(" ", "\r\n").encode("utf-8-sig"), 1)
    add("sub/guide.md", b"# Guide\n\n" + prose("md").encode(), 1)
    add("sub/README.md", prose("a readme of a folder inside").encode(), 1)
    add("packed.txt.gz", gzip.compress(prose("gz").encode()), 1)
    add("space in name.txt", b" \n", 1)  # a document, which a filter drops as short
    add("marks.txt", b"\xef\xbb\xbf", 0, empty=1)
    add("page.html", PAGE.replace("sea", "lake").encode(), 1)
    add("PAGE.HTM", PAGE.replace("sea", "moor").encode(), 1)
    add("rows.jsonl", line("a") + b"\n" + b"\xef\xbb\xbf" + line("b") + b"{no json\n", 2, corrupt=1)
    add(
        "dialect.NDJSON",
        line("c")[:-2] + b', "score": NaN}\n[1]\n{"text": ""}\n',
        1,
        corrupt=1,
        empty=1,
    )
    add("array.json", b"[" + line("d") + b"," + line("e") + b"]", 2)
    add("utf16.jsonl", line("f").decode().encode("utf-16"), 1)
    packed = gzip.compress(line("g") + os.urandom(20_000).hex().encode())
    add("cut.jsonl.gz", packed[:5000], 1, damaged_file=1)
    add("noise.jsonl.gz", b"no gzip at all", 0, damaged_file=1)
    add("cut.parquet", b"PAR1 and nothing else", 0, damaged_file=1)
    write_parquet(
        folder / "good.parquet", {"text": [prose(f"good {i}") for i in range(20)] + [None]}
    )
    expected["good.parquet"] = 20, {"empty": 1}
    columns = {"text": [prose(f"damaged {i}") for i in range(30)]}
    write_parquet(folder / "damaged.parquet", columns, row_group_size=10)
    damage_group(folder / "damaged.parquet", 1, 0)
    expected["damaged.parquet"] = 20, {"damaged_rows": 10}
    with (folder / "crawl.warc.gz").open("wb") as file:
        write_archive(file, iter([("http://h.invalid/a", PAGE.replace("sea", "bay"))]))
    expected["crawl.warc.gz"] = 1, {}
    return expected


IGNORED = {
    "hidden": [".DS_Store", ".cache/a.jsonl", "._rows.jsonl"],
    "empty": ["empty.jsonl", "empty.parquet", "empty.txt"],
    ".csv": ["a.csv"],
    ".csv.gz": ["a.csv.gz"],
    ".png": [f"image{i}.PNG" for i in range(5)],
    ".zst": ["RC_2019-01.zst"],
    ".gz": ["archive.gz"],
    ".parquet.gz": ["packed.parquet.gz"],
    "no suffix": ["LICENSE", "_SUCCESS"],
    "readme": ["README.md"],
    "not a file": ["link", "nowhere.txt", "pipe.jsonl"],
}


def write_ignored(folder: Path) -> None:
    for reason, names in IGNORED.items():
        for name in names if reason != "not a file" else ():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"" if reason == "empty" else line(name))
    (folder / "link").symlink_to(folder, target_is_directory=True)  # a loop
    (folder / "nowhere.txt").symlink_to("nothing")
    os.mkfifo(folder / "pipe.jsonl")


def config_of(source: Source, tmp_path: Path) -> DataConfig:
    """A data set of one source, `world`, with a trained vocabulary."""
    tokenizer.train([prose(str(i)) for i in range(40)], 300, tmp_path / "vocabulary")
    return DataConfig(
        folder=str(tmp_path / "data"),
        seed=0,
        block_tokens=64,
        heldout_percent=20.0,
        reset_state=True,
        workers=1,
        keep_exclusions=True,
        tokenizer=TokenizerConfig(str(tmp_path / "vocabulary" / tokenizer.FILE), None, 300, 1),
        sources={"world": source},
        stages=[Stage("only", 64, 64, {"world": 1.0})],
    )


def test_every_file_and_row_of_a_folder_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """files on disk = read + ignored; rows = documents + dropped; clean documents = in shards."""
    raw = tmp_path / "raw"
    expected = write_world(raw)
    write_ignored(raw)
    (raw / "linked.txt").symlink_to(raw / "notes.txt")
    expected["linked.txt"] = 1, {}
    cfg = config_of(Source("manuals", str(raw), "CC0-1.0", 1.0, 3), tmp_path)
    prepare(cfg)

    record = json.loads((tmp_path / "data" / "report.json").read_text())
    files = record["files"]["world"]
    ignored = files["ignored"]
    on_disk = [path for path in raw.rglob("*") if not path.is_dir() or path.is_symlink()]
    assert {reason: entry["files"] for reason, entry in ignored.items()} == {
        reason: len(names) for reason, names in IGNORED.items()
    }
    assert ignored[".png"]["examples"] == IGNORED[".png"][:3]
    assert files["read"] == len(expected)
    assert files["read"] + sum(entry["files"] for entry in ignored.values()) == len(on_disk)
    assert ".png 5 (image0.PNG, image1.PNG, image2.PNG, ...)" in capsys.readouterr().out

    reader, *filters = record["steps"]["world"]
    assert reader["files"] == len(expected)
    dropped: dict[str, int] = {}
    for _, reasons in expected.values():
        for reason, count in reasons.items():
            dropped[reason] = dropped.get(reason, 0) + count
    assert reader["dropped"] == dropped
    assert reader["forwarded"] == sum(documents for documents, _ in expected.values())
    (extractor,) = (step for step in filters if step["name"] == "Trafilatura")
    assert extractor["total"] - extractor["unchanged"] == 3, "pages"
    assert extractor["dropped"] == {}
    lost = {reason: n for step in filters for reason, n in step["dropped"].items()}
    manifest = read_manifest(source_folder(cfg, "world"))
    documents = sum(file.documents for file in manifest.files())
    assert sum(lost.values()) == 1 and documents == reader["forwarded"] - 1


@pytest.mark.parametrize(
    ("rows", "reasons"),
    [([], "its files have no rows"), ([""], "Parquet: empty 1"), (["short"], "Plausible: short 1")],
)
def test_a_source_without_documents_says_why(tmp_path: Path, rows: list[str], reasons: str) -> None:
    (tmp_path / "raw").mkdir()
    write_parquet(tmp_path / "raw" / "a.parquet", {"text": pyarrow.array(rows, pyarrow.string())})
    cfg = config_of(Source("curated", str(tmp_path / "raw"), "CC0-1.0", 1.0, 1), tmp_path)
    message = (
        f"source world: all {len(rows)} documents were dropped \\({reasons}\\): set recipe and "
    )
    with pytest.raises(InputError, match=message + "text_key of data.sources.world"):
        prepare(cfg)


def test_html_files_are_refused_where_their_text_is_not_extracted(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.txt").write_text(PROSE)
    (raw / "b.html").write_text(PAGE)
    with pytest.raises(
        InputError, match=r"has web pages \(1 files, first b.html\): use recipe web"
    ):
        run_recipe(make_source("curated", raw), tmp_path / "clean")


def test_a_broken_extractor_does_not_hide_behind_plain_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(9):
        (raw / f"{i}.txt").write_text(prose(str(i)))
    (raw / "page.html").write_text(PAGE)
    monkeypatch.setattr(MainTextExtractor, "extract", lambda self, text: None)
    _, steps = run_recipe(make_source("manuals", raw), tmp_path / "clean")
    with pytest.raises(RuntimeError, match="text was extracted from 0 of 1 pages"):
        accounting.check_yield("world", steps, 0.5)


def test_entities_of_pages_are_normalized(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    page = PAGE.replace("river", "ri&#8203;v&shy;er&#x2028;")
    (raw / "a.html").write_text(page)
    (row,), _ = run_recipe(make_source("manuals", raw), tmp_path / "clean")
    assert row["text"].startswith("The river") and not {"\u200b", "\xad", "\u2028"} & {*row["text"]}


def test_a_file_that_is_not_read_by_any_task_is_noticed(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("a", "b"):
        (raw / f"{name}.jsonl").write_bytes(line(name))
    found = list_raw_files(str(raw))
    source = make_source("curated", raw)
    (tmp_path / "clean").mkdir()
    build = Build(source, NO_ASSETS, tmp_path / "clean", False)
    clean.start(build, listing.Listing("jsonl", {"a.jsonl": found.files["a.jsonl"]}))
    clean.clean_task(build, 0)
    steps = clean.count_documents(build)
    with pytest.raises(AssertionError, match="1 of 2 input files were read"):
        accounting.check_files("world", steps, found)


def test_a_listing_of_many_suffixes_stays_small(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"a.{i}").write_bytes(b"x")
    (tmp_path / "a.jsonl").write_bytes(line("a"))
    ignored = list_raw_files(str(tmp_path)).ignored
    assert len(ignored) == listing.MAX_REASONS + 1
    assert sum(entry["files"] for entry in ignored.values()) == 60
    assert ignored["other suffixes"]["files"] == 60 - listing.MAX_REASONS


def test_a_text_file_too_large_for_one_document_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.txt").write_text(PROSE)
    monkeypatch.setattr(listing, "MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(InputError, match="corpus.txt .* would be one document: split it"):
        list_raw_files(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "kind", "suffix"),
    [
        ("a.JSONL.GZ", "jsonl", ".jsonl"),
        ("d.v1/a.ndjson.zst", "jsonl", ".ndjson"),
        ("a.Parquet", "parquet", ".parquet"),
        ("a.parquet.gz", None, ".parquet"),
        ("a.warc.gz", "warc", ".warc"),
        ("a.jsonl.tmp", None, ".tmp"),
        ("jsonl", None, ""),
        ("a.gz", None, ""),
    ],
)
def test_a_suffix_decides_how_a_file_is_read(name: str, kind: str | None, suffix: str) -> None:
    assert (kind_of(name), data_suffix(name)) == (kind, suffix)


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_archives_are_read_in_every_compression(tmp_path: Path, suffix: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    stream = io.BytesIO()
    write_archive(stream, ((f"http://h.invalid/{i}", f"<p>{i} {PROSE}</p>") for i in range(3)))
    archive = gzip.decompress(stream.getvalue())
    packed = PACK[suffix](archive) if suffix else archive
    (raw / f"a.warc{suffix}").write_bytes(packed)
    texts, dropped = read(raw)
    assert len(texts) == 3 and not dropped
    (raw / f"a.warc{suffix}").write_bytes(packed[: len(packed) * 2 // 3 + 20])
    texts, dropped = read(raw)
    assert len(texts) < 3 and sum(dropped.values()) >= 1
