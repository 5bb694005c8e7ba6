"""Recipes: every row is accounted for, and no text of the host belongs to two sources."""

import gzip
import json
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data import counts, pipelines, recipes
from data.config import InputError, Source
from data.recipes import arithmetic, curated, host, source_code, technical, web
from data.recipes.readers import open_input, pin_files, raw_files

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"
PROSE = (
    "The river rises in the hills to the north of the town and runs, with many turns, to the sea. In the spring it "
    "carries the snow of the mountains, and the fields on both sides have to be kept dry with ditches that the farmers "
    "dig and clean together. Nobody who has seen the water that comes in a wet year would call this work idle. "
)


def folder_source(recipe: str, folder: Path, tasks: int = 1) -> Source:
    return Source(recipe, str(folder), "CC0-1.0", 1.0, tasks)


def pin(folder: str, place: Path) -> Path:
    """Fix the input files of a build, as prepare does."""
    place.mkdir(exist_ok=True)
    kind, files = raw_files(folder)
    pin_files(place, kind, list(files))
    return place


def run(source: Source, place: Path) -> tuple[list[dict[str, str]], list[counts.Step]]:
    """Clean documents of a source, and the counts of its steps."""
    pin(source.input, place)
    for rank in range(source.tasks):
        pipelines.clean_task(source, place, rank)
    files = sorted(place.glob("*.jsonl.gz"))
    rows = [json.loads(line) for path in files for line in gzip.decompress(path.read_bytes()).splitlines()]
    return rows, counts.read_counts(place / "datatrove" / "stats", source.tasks)


def write_rows(path: Path, rows: list[object]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_row_is_kept_or_dropped_for_a_reason(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_rows(raw / "a.jsonl", [{"text": PROSE}, {"text": ""}, {"text": None}, {"text": 7}, [1], {"text": "short"}])
    with gzip.open(raw / "b.jsonl.gz", "wb") as file:
        file.write(b'{"text": "' + PROSE.encode() + b'2", "group": "g"}\n{"text": \n{"text": "\xff"}\n')
        file.write(json.dumps({"text": "1234567890 " * 60, "id": "digits"}).encode() + b"\n")
        file.write(json.dumps({"text": PROSE + "3", "metadata": {"group": "g"}}).encode() + b"\n")
    rows, steps = run(folder_source("technical", raw, tasks=2), tmp_path / "clean")
    assert [row["text"] for row in rows] == [PROSE, PROSE + "2", PROSE + "3"]
    assert [row["group"] for row in rows][1:] == ["g", "g"]
    assert (steps[0].total, steps[0].dropped) == (11, {"corrupt": 4, "empty": 2})
    assert steps[1].dropped == {"short": 1, "few_letters": 1}
    assert steps[-1].forwarded == 3
    assert counts.reasons(steps) == "Jsonl: corrupt 4, empty 2; Plausible: few_letters 1, short 1"
    log = "".join(path.read_text() for path in (tmp_path / "clean/datatrove/logs").iterdir())
    assert "b.jsonl.gz:1: dropped as corrupt" in log


def test_a_file_that_arrives_meanwhile_belongs_to_the_next_build(tmp_path: Path) -> None:
    """Tasks of one build share one list: with a list each, they would read some files twice and some never."""
    raw, place = tmp_path / "raw", tmp_path / "clean"
    for name in ("b", "d"):
        write_rows(raw / f"{name}.jsonl", [{"text": PROSE + name}])
    source = folder_source("curated", raw, tasks=2)
    pin(source.input, place)
    pipelines.clean_task(source, place, 0)
    write_rows(raw / "a.jsonl", [{"text": PROSE + "a"}])
    pipelines.clean_task(source, place, 1)
    written = b"".join(gzip.decompress(path.read_bytes()) for path in sorted(place.glob("*.jsonl.gz")))
    assert [json.loads(line)["text"][-1] for line in written.splitlines()] == ["b", "d"]


def test_crawls_meet_the_published_thresholds(tmp_path: Path) -> None:
    """The host's help pages need milder ones; folders do not get them."""
    (tmp_path / "raw").mkdir()
    write_rows(tmp_path / "raw" / "a.jsonl", [{"text": PROSE}])
    place = pin(str(tmp_path / "raw"), tmp_path / "place")
    crawl = web.steps(folder_source("web", tmp_path / "raw"), place)[-1]
    host_pages = web.steps(Source("web", "host", "PSF-2.0", 1.0, 1), tmp_path)[-1]
    assert (crawl.max_non_alpha_words_ratio, crawl.min_stop_words) == (0.8, 2)
    assert (host_pages.max_non_alpha_words_ratio, host_pages.min_stop_words) == (0.4, 1)
    repetition = web.steps(folder_source("web", tmp_path / "raw"), place)[-2]
    assert (repetition.dup_line_frac, repetition.dup_line_char_frac) == (0.3, 0.2)
    assert [share for _, share in repetition.dup_n_grams] == [0.15, 0.14, 0.13, 0.12, 0.11, 0.10]


def test_formulas_are_text_and_tables_of_digits_are_not(tmp_path: Path) -> None:
    """As configs/data/falcon_mamba.yaml cleans mathematics: a floor of half letters would drop both."""
    formulas = (
        "Let x^2 + y^2 = 25 with 0 < x < y. Then (x + y)^2 - 2*x*y = 25, so x = 3, y = 4, x*y = 12, x + y = 7. " * 3
    )
    write_rows(tmp_path / "raw" / "a.jsonl", [{"text": formulas}, {"text": "1 2 4 8 16 32 64 " * 40}])
    recipe = OmegaConf.load(CONFIGS / "falcon_mamba.yaml").sources.math.recipe
    rows, steps = run(folder_source(recipe, tmp_path / "raw"), tmp_path / "clean")
    assert [row["text"] for row in rows] == [formulas] and steps[1].dropped == {"few_letters": 1}
    assert not run(folder_source("curated", tmp_path / "raw"), tmp_path / "curated")[0]


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "raw").mkdir()
    parquet.write_table(pyarrow.table({"text": [PROSE, None], "id": ["x", "y"]}), tmp_path / "raw" / "a.parquet")
    rows, steps = run(folder_source("curated", tmp_path / "raw"), tmp_path / "clean")
    assert [row["id"] for row in rows] == ["x"] and steps[0].dropped == {"empty": 1}


def test_lost_documents_are_noticed() -> None:
    with pytest.raises(AssertionError, match="inside a step"):
        counts.check_conservation([counts.Step("filter", 10, 8, {"short": 1})])
    with pytest.raises(AssertionError, match="between steps"):
        counts.check_conservation([counts.Step("reader", 10, 10, {}), counts.Step("filter", 9, 9, {})])
    with pytest.raises(RuntimeError, match="text was extracted from 4 of 10 pages"):
        counts.check_yield("web", [counts.Step("Trafilatura", 10, 4, {"timeout": 6})])


def test_mistakes_in_the_input_name_their_fix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist: set data.sources"):
        raw_files(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(InputError, match="put files of one kind there"):
        raw_files(str(tmp_path))
    (tmp_path / "a.warc.gz").write_bytes(b"")
    with pytest.raises(InputError, match="use recipe web"):
        open_input(str(tmp_path), pin(str(tmp_path), tmp_path / "place"))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="mixes jsonl and warc"):
        raw_files(str(tmp_path))


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"text": PROSE}).encode() * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a.jsonl.gz is damaged .* fetch it again"):
        list(open_input(str(tmp_path), pin(str(tmp_path), tmp_path / "place")).run())


def test_web_archives_give_text(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    body = f"<p>{PROSE}</p><p>Its fish are sold on the market of the town, on Fridays.</p>"
    page = f"<html><head><title>Rivers</title></head><body><nav>Home</nav><article>{body}</article></body></html>"
    with (raw / "a.warc.gz").open("wb") as file:
        web.write_archive(file, iter([("good", page), ("poor", "<html><body><p>Too short.</p></body></html>")]))
    rows, steps = run(folder_source("web", raw), tmp_path / "clean")
    assert len(rows) == 1 and "sold on the market" in rows[0]["text"] and "<p>" not in rows[0]["text"]
    assert steps[0].total == 2 and steps[-1].forwarded == 1


def test_missing_package_is_named_before_the_first_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lxml_html_clean", None)
    with pytest.raises(InputError, match="`pip install lxml_html_clean`"):
        recipes.load("web")


def test_help_pages_keep_this_machine_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for name in ("os", "ftplib", "textwrap", "json"):
        page = web.help_page(name)
        assert page is not None
        assert "hunter2" not in page and str(Path(host.__file__).parent) not in page and "0x7f" not in page
        assert host.modules()[name].as_posix() not in page
    assert web.help_page("no_such_module") is None
    assert "class <strong>JSONDecoder" not in web.help_page("json"), "defined in json.decoder, which has its own page"


def test_a_module_belongs_to_one_recipe() -> None:
    modules = host.modules()
    assert len(modules) > 300 and not any(re.search(r"\b(tests?|idlelib|site-packages)\b", name) for name in modules)
    assert not host.IMPORTABLE & {"this", "antigravity", "idlelib", "tkinter", "turtle", "test", "os", "sys"}
    shares = {recipe: dict(host.modules_of(recipe)) for recipe in ("web", "technical", "source_code")}
    assert sum(map(len, shares.values())) == len(modules) and set().union(*shares.values()) == set(modules)
    assert all(host.recipe_of(name) == host.recipe_of(name.split(".")[0]) for name in modules)
    assert all(name.split(".")[0] in host.IMPORTABLE for name in shares["web"])


def test_reference_page_is_read_without_running_the_module() -> None:
    source = 'raise SystemExit\nclass A(int):\n    "About A."\n    def f(self, x=1) -> int:\n        "Gives x."\n'
    page = technical.reference_page("m", '"""Head."""\n' + source)
    assert page == "m\n=\n\nHead.\n\nclass A(int)\n    About A.\n\n    def f(self, x=1) -> int\n        Gives x.\n"
    assert technical.reference_page("m", "x = 1") == ""


def test_host_texts_differ() -> None:
    texts = [row["text"] for rows in (curated.host_topics, technical.host_pages) for row in rows() if row["text"]]
    assert len(texts) > 100 and len(set(texts)) == len(texts)


def test_generated_and_minified_code_is_dropped(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "raw" / "a.jsonl",
        [
            {"text": '"""Sums."""\n\n' + "def add(first, second):\n    return first + second\n" * 4},
            {"text": "# Generated from a grammar; do not edit\n" + "name = value\n" * 20},
            {"text": "x" * 2000},
        ],
    )
    rows, steps = run(folder_source("source_code", tmp_path / "raw"), tmp_path / "clean")
    assert len(rows) == 1 and steps[1].dropped == {"generated": 1} and steps[2].dropped == {"long_line": 1}
    assert source_code.steps(Source("source_code", "host", "PSF-2.0", 1.0, 1), tmp_path)


def test_problems_are_right_distinct_and_the_same_again() -> None:
    rows = list(arithmetic.problems(400_000))
    assert rows[:50] == list(islice(arithmetic.problems(), 50))
    assert len({row["text"] for row in rows}) == len(rows) == len({row["group"] for row in rows})
    checked = 0
    for row in rows:
        for a, sign, b, c in re.findall(r"(?<![\d*+/] )\b(\d+) ([-+*]) (\d+) = (\d+)\b(?![./]| [-+*/])", row["text"]):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(c), row["text"]
            checked += 1
    assert checked > 3000
