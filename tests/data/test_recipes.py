"""Recipes: every row is counted, and every dropped row has a reason."""

import gzip
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.errors import InputError
from data import recipes
from data.config import Assets, Source
from data.pipeline import accounting, clean
from data.pipeline.clean import Build
from data.readers.inputs import DocumentReader, open_input
from data.readers.listing import list_raw_files
from data.recipes import books, manuals, web
from data.recipes.extraction import MainTextExtractor
from data.recipes.lines import correct_line
from examples.demo_corpus.archives import write_archive
from tests.data.samples import (
    GERMAN,
    NO_ASSETS,
    PROSE,
    QUESTION,
    SHOP,
    SUMS,
    make_assets,
    make_source,
    pin_input,
    read_clean_rows,
    run_recipe,
    write_rows,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"


def test_every_row_is_kept_or_dropped_with_a_reason(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_rows(
        raw / "a.jsonl",
        [{"text": PROSE}, {"text": ""}, {"text": None}, {"text": 7}, [1], {"text": "short"}],
    )
    with gzip.open(raw / "b.jsonl.gz", "wb") as file:
        file.write(
            b'{"text": "' + PROSE.encode() + b'2", "group": "g"}\n{"text": \n{"text": "\xff"}\n'
        )
        file.write(json.dumps({"text": "1234567890 " * 60, "id": "digits"}).encode() + b"\n")
        file.write(json.dumps({"text": PROSE + "3", "metadata": {"group": "g"}}).encode() + b"\n")
    rows, steps = run_recipe(make_source("technical", raw, tasks=2), tmp_path / "clean")
    assert [row["text"] for row in rows] == [PROSE, PROSE + "2", PROSE + "3"]
    assert [row["group"] for row in rows][1:] == ["g", "g"]
    assert (steps[0].total, steps[0].dropped) == (11, {"corrupt": 4, "empty": 2})
    assert steps[2].dropped == {"short": 1, "few_letters": 1}
    assert steps[-1].forwarded == 3
    assert (
        accounting.drop_reasons(steps)
        == "Jsonl: corrupt 4, empty 2; Plausible: few_letters 1, short 1"
    )
    log = "".join(path.read_text() for path in (tmp_path / "clean/logs/clean/logs").iterdir())
    assert "b.jsonl.gz:1: dropped as corrupt" in log


def test_files_added_during_a_build_are_ignored(tmp_path: Path) -> None:
    """If each task listed the folder, files would be read twice or never."""
    raw = tmp_path / "raw"
    build_dir = tmp_path / "clean"
    for name in ("b", "d"):
        write_rows(raw / f"{name}.jsonl", [{"text": PROSE + name}])
    source = make_source("curated", raw, tasks=2)
    pin_input(source, build_dir)
    clean.clean_task(Build(source, NO_ASSETS, build_dir, True), 0)
    write_rows(raw / "a.jsonl", [{"text": PROSE + "a"}])
    clean.clean_task(Build(source, NO_ASSETS, build_dir, True), 1)
    assert [row["text"][-1] for row in read_clean_rows(build_dir)] == ["b", "d"]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("assets"))


def test_web_uses_the_published_thresholds(tmp_path: Path, assets: Assets) -> None:
    write_rows(tmp_path / "raw" / "a.jsonl", [{"text": PROSE}])
    source = make_source("web", tmp_path / "raw")
    build_dir = pin_input(source, tmp_path / "build")
    language, repetition, quality, _ = web.steps(source, build_dir, assets)[1:]
    assert (language.label, language.min_score) == ("en", 0.65)
    assert (repetition.dup_line_frac, repetition.dup_line_char_frac) == (0.3, 0.2)
    assert [frac for _, frac in repetition.dup_n_grams] == [0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    assert (quality.max_non_alpha_words_ratio, quality.min_stop_words) == (0.8, 2)
    # recipe manuals has looser thresholds
    quality = manuals.steps(source, build_dir, NO_ASSETS)[-1]
    assert (quality.max_non_alpha_words_ratio, quality.min_stop_words) == (0.4, 1)


def test_mathematics_keeps_formulas_and_drops_digit_tables(tmp_path: Path) -> None:
    """Recipe curated, which asks for half letters, drops both."""
    formulas = (
        "Let x^2 + y^2 = 25 with 0 < x < y. Then (x + y)^2 - 2*x*y = 25, so x = 3, y = 4, x*y = "
        "12, x + y = 7. " * 3
    )
    write_rows(
        tmp_path / "raw" / "a.jsonl", [{"text": formulas}, {"text": "1 2 4 8 16 32 64 " * 40}]
    )
    recipe = OmegaConf.load(CONFIGS / "falcon_mamba.yaml").sources.math.recipe
    rows, steps = run_recipe(make_source(recipe, tmp_path / "raw"), tmp_path / "clean")
    assert [row["text"] for row in rows] == [formulas] and steps[1].dropped == {"few_letters": 1}
    assert not run_recipe(make_source("curated", tmp_path / "raw"), tmp_path / "curated")[0]
    with pytest.raises(InputError, match="treats all numbers as equal"):
        run_recipe(
            replace(make_source(recipe, tmp_path / "raw"), near_duplicates="14x8"),
            tmp_path / "again",
        )


def test_parquet_drops_only_the_rows_of_a_damaged_row_group(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "a.parquet"
    columns = {
        "content": [f"{PROSE} {i}" for i in range(30)] + [None],
        "id": [str(i) for i in range(31)],
    }
    parquet.write_table(
        pyarrow.table(columns), path, row_group_size=10, use_dictionary=False, compression="snappy"
    )
    source = replace(make_source("curated", tmp_path / "raw"), text_key="content")
    rows, steps = run_recipe(source, tmp_path / "clean")
    assert [row["id"] for row in rows] == [str(i) for i in range(30)] and steps[0].dropped == {
        "empty": 1
    }
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    rows, steps = run_recipe(source, tmp_path / "damaged")
    assert [row["id"] for row in rows] == [str(i) for i in (*range(10), *range(20, 30))]
    assert steps[0].dropped == {"empty": 1, "damaged_rows": 10} and steps[0].total == 31
    with pytest.raises(InputError, match="has no column text, but content, id: set data.sources"):
        run_recipe(make_source("curated", tmp_path / "raw"), tmp_path / "wrong")


def test_lost_documents_raise() -> None:
    with pytest.raises(AssertionError, match="inside a step"):
        accounting.check_conservation([accounting.StepCounts("filter", 10, 8, {"short": 1})])
    with pytest.raises(AssertionError, match="between steps"):
        accounting.check_conservation(
            [accounting.StepCounts("reader", 10, 10, {}), accounting.StepCounts("filter", 9, 9, {})]
        )
    with pytest.raises(RuntimeError, match="text was extracted from 4 of 10 pages"):
        accounting.check_yield(
            "web", [accounting.StepCounts("Trafilatura", 10, 4, {"timeout": 6})], 0.5
        )


def test_input_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist: set data.sources"):
        list_raw_files(str(tmp_path / "nowhere"))
    (tmp_path / "notes.csv").write_text("text")
    with pytest.raises(InputError, match=r"no documents \(.csv 1 \(notes.csv\)\): put files"):
        list_raw_files(str(tmp_path))
    (tmp_path / "a.warc.gz").write_bytes(b"archive")
    source = make_source("curated", tmp_path)
    build_dir = pin_input(source, tmp_path / "build")
    with pytest.raises(InputError, match="use recipe web, manuals or mathematics"):
        open_input(source, build_dir)


def test_a_truncated_file_yields_its_readable_rows(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [
        json.dumps({"text": f"{PROSE} {i} {hash(str(i))}"}).encode() + b"\n" for i in range(2000)
    ]
    compressed = gzip.compress(b"".join(lines))
    (raw / "a.jsonl.gz").write_bytes(compressed[: len(compressed) // 2])
    (raw / "b.jsonl.gz").write_bytes(b"no gzip at all")
    (raw / "c.jsonl.gz").write_bytes(gzip.compress(lines[0]))
    rows, steps = run_recipe(make_source("curated", raw), tmp_path / "clean")
    assert 100 < len(rows) < 2000 and rows[-1]["text"] == json.loads(lines[0])["text"]
    assert steps[0].dropped == {"damaged_file": 2} and steps[0].total == len(rows) + 2
    (quarantine,) = (tmp_path / "clean" / "quarantine").iterdir()
    assert [json.loads(line)["where"] for line in quarantine.open()] == ["a.jsonl.gz", "b.jsonl.gz"]


def test_a_disk_error_is_not_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "raw" / "a.jsonl", [{"text": PROSE}])
    monkeypatch.setattr(
        DocumentReader,
        "read_file",
        lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")),
    )
    with pytest.raises(InputError, match="a.jsonl cannot be read .* try again"):
        run_recipe(make_source("curated", tmp_path / "raw"), tmp_path / "clean")


def test_web_archives_are_cleaned(tmp_path: Path, assets: Assets) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    body = (
        f"<p>{PROSE}</p><p>Its fish are sold on the market of the town, on Fridays.</p><p>3 "
        "likes</p>"
    )
    head = "<head><title>Rivers</title></head>"
    page = f"<html>{head}<body><nav>Home</nav><article>{body}</article></body></html>"
    pages = [
        ("http://host.invalid/good.html", page),
        ("<http://host.invalid/poor.html>", "<html><body><p>Too short.</p></body></html>"),
        ("http://casino-lists.com/good.html", page),
        ("http://en.wikipedia.org/wiki/River", page),
        ("http://host.invalid/fluss.html", page.replace(PROSE, 3 * GERMAN)),
    ]
    with (raw / "a.warc.gz").open("wb") as file:
        write_archive(file, iter(pages))
    with (raw / "b.warc.gz").open("wb") as file:
        write_archive(file, iter(pages[:1]))
    (raw / "b.warc.gz").write_bytes((raw / "b.warc.gz").read_bytes()[:-40])
    rows, steps = run_recipe(make_source("web", raw), tmp_path / "clean", assets)
    assert (
        len(rows) == 1 and "sold on the market" in rows[0]["text"] and "<p>" not in rows[0]["text"]
    )
    assert rows[0]["url"] == "http://host.invalid/good.html"
    dropped = {step.name: step.dropped for step in steps if step.dropped}
    assert dropped["Warc"] == {"damaged_file": 1}
    assert dropped["URL"] == {"domain": 1, "curated_site": 1}
    assert "not_english" in dropped["Language"] and steps[0].total == 6
    excluded = {path.name: path for path in (tmp_path / "clean/excluded/clean").iterdir()}
    assert len(list(excluded["01-url"].iterdir())) == 1


@pytest.mark.parametrize("suffix", [".warc", ".warc.gz"])
def test_a_truncated_archive_is_detected(tmp_path: Path, suffix: str) -> None:
    """warcio mistakes the end of a truncated gzip stream for the end of the archive."""
    pages = [(f"http://host.invalid/{i}", f"<p>{i} {PROSE}</p>") for i in range(3)]
    stream = io.BytesIO()
    write_archive(stream, iter(pages))
    archive = stream.getvalue() if suffix == ".warc.gz" else gzip.decompress(stream.getvalue())
    source = make_source("web", tmp_path / "raw")
    for missing_bytes in (0, 1, 3, 40, 200, 500, 900):
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        (raw / f"a{suffix}").write_bytes(archive[: len(archive) - missing_bytes])
        reader = open_input(source, pin_input(source, tmp_path / "build"), allow_html=True)
        documents = list(reader.run())
        dropped = {
            name: stat.total
            for name, stat in reader.stats.stats.items()
            if name.startswith("dropped_")
        }
        assert dropped == ({"dropped_damaged_file": 1} if missing_bytes else {}), missing_bytes
        assert len(documents) <= 3 if missing_bytes else len(documents) == 3
        assert len(documents) >= 2 or missing_bytes > 300


def test_failed_extractions_are_dropped_with_a_reason(
    tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raw").mkdir()
    with (tmp_path / "raw" / "a.warc").open("wb") as file:
        write_archive(
            file, iter([(f"http://h.invalid/{i}", f"<p>{i} {PROSE}</p>") for i in range(4)])
        )

    def extract(self: object, text: str) -> str | None:
        if "<p>1 " in text:
            os._exit(1)
        if "<p>2 " in text:
            raise ValueError("markup")
        return None if "<p>3 " in text else "text"

    monkeypatch.setattr(MainTextExtractor, "extract", extract)
    _, steps = run_recipe(make_source("web", tmp_path / "raw"), tmp_path / "clean", assets)
    (step,) = [step for step in steps if step.name == "Trafilatura"]
    assert (
        step.total == 4
        and step.forwarded == 1
        and set(step.dropped) <= {"crash", "error", "no_text"}
    )
    assert sum(step.dropped.values()) == 3 and step.dropped["no_text"] == 1


def test_a_missing_model_is_refused_before_the_first_document(tmp_path: Path) -> None:
    source = make_source("web", tmp_path)
    with pytest.raises(
        InputError, match="source crawl needs data.assets.language_model.path, now None: .*download"
    ):
        clean.check_assets("crawl", source, NO_ASSETS)
    assert clean.check_assets("help", replace(source, recipe="manuals"), NO_ASSETS) == []


def test_page_furniture_is_removed() -> None:
    corrected = {
        "He said READ THIS to her.": "He said READ THIS to her.",
        "": "",
        "Sign in to see the other fish": " to see the other fish",
        "The story goes on and on. Read more...": "The story goes on and on. ",
    }
    for line, expected in corrected.items():
        assert correct_line(line) == expected
    for line in (
        "BUY ONE NOW",
        "12,345",
        "3 likes",
        "1.2k comments",
        "Home",
        "- 7 -",
        "items in cart",
    ):
        assert correct_line(line) is None, line


def test_documents_with_evaluation_text_are_dropped(tmp_path: Path, assets: Assets) -> None:
    rows = [{"text": f"{PROSE} Somebody asked: {QUESTION.upper()}"}, {"text": PROSE}]
    write_rows(tmp_path / "raw" / "a.jsonl", rows)
    source = replace(make_source("curated", tmp_path / "raw"), decontaminate=True)
    kept, steps = run_recipe(source, tmp_path / "clean", assets)
    assert [row["text"] for row in kept] == [PROSE] and steps[-2].dropped == {"evaluation_text": 1}


def test_email_and_ip_addresses_are_replaced(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "raw" / "a.jsonl",
        [{"text": f"{PROSE} Write to ann.lee@corp.org from 8.8.8.8 or 10.0.0.1."}],
    )
    source = replace(make_source("curated", tmp_path / "raw"), replace_pii=True)
    (row,), _ = run_recipe(source, tmp_path / "clean")
    assert (
        "ann.lee" not in row["text"] and "8.8.8.8" not in row["text"] and "10.0.0.1" in row["text"]
    )


def test_mathematics_keeps_what_the_classifier_selects(tmp_path: Path, assets: Assets) -> None:
    write_rows(tmp_path / "raw" / "a.jsonl", [{"text": 3 * SUMS}, {"text": 3 * SHOP}])
    rows, steps = run_recipe(
        make_source("mathematics", tmp_path / "raw"), tmp_path / "clean", assets
    )
    assert [row["text"] for row in rows] == [3 * SUMS] and steps[1].dropped == {"not_math": 1}


def test_books_lose_licence_texts_and_synthetic_text_loses_refusals(tmp_path: Path) -> None:
    story = "\n".join(
        f"{PROSE} In the year {i} nothing else happened on the {i * i} fields of the vil-\nlage."
        for i in range(6)
    )
    markers = (
        "*** START OF THE PROJECT GUTENBERG EBOOK RIVERS ***",
        "*** END OF THE PROJECT GUTENBERG EBOOK RIVERS ***",
    )
    book = f"Licence.\n{markers[0]}\n{story}\n 12 \n{markers[1]}\nMore."
    document = type("D", (), {"text": book})()
    assert books.BookBody().filter(document) is True
    assert (
        document.text.startswith("The river")
        and document.text.endswith("village.")
        and " 12 " not in document.text
    )
    write_rows(
        tmp_path / "raw" / "a.jsonl",
        [{"text": PROSE}, {"text": "As an AI language model, I like rivers. " + PROSE}],
    )
    rows, steps = run_recipe(make_source("synthetic", tmp_path / "raw"), tmp_path / "clean")
    assert [row["text"] for row in rows] == [PROSE] and steps[1].dropped == {"refusal": 1}


def test_inputs_on_other_filesystems_are_read(tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/raw/a.jsonl", json.dumps({"text": PROSE}).encode())
    rows, _ = run_recipe(
        Source("curated", "memory://bucket/raw", "CC0-1.0", 1.0, 1), tmp_path / "clean"
    )
    assert [row["text"] for row in rows] == [PROSE]
    with pytest.raises(InputError, match="needs a package .*s3fs.*: pip install it"):
        list_raw_files("s3://bucket/raw")


def test_missing_package_is_named_before_the_first_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lxml_html_clean", None)
    monkeypatch.setattr("core.entry.extra_for_module", lambda module: "data")
    with pytest.raises(InputError, match=r"lxml_html_clean.*: pip install .*\[data\]"):
        recipes.load("web")


def test_generated_and_minified_code_is_dropped(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "raw" / "a.jsonl",
        [
            {
                "text": '"""Sums."""\n\n'
                + "def add(first, second):\n    return first + second\n" * 4
            },
            {"text": "# Generated from a grammar; do not edit\n" + "name = value\n" * 20},
            {"text": "x" * 2000},
        ],
    )
    rows, steps = run_recipe(make_source("source_code", tmp_path / "raw"), tmp_path / "clean")
    assert (
        len(rows) == 1
        and steps[1].dropped == {"generated": 1}
        and steps[2].dropped == {"long_line": 1}
    )
