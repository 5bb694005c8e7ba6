"""The demo corpus: distinct sources, no data of this machine, files that recipes can read."""

import re
from itertools import islice
from pathlib import Path

import pytest

from data.config import Source
from examples.demo_corpus import arithmetic, standard_library
from tests.commands import python
from tests.data.samples import run_recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "raw"
    for message in ("MB of raw text", "reused"):
        result = python("examples/make_demo_corpus.py", folder)
        assert result.returncode == 0 and message in result.stdout, result.stderr
    return folder


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "made.json").write_text('{"version": 0}')
    result = python("examples/make_demo_corpus.py", tmp_path)
    assert result.returncode == 2 and "contains mine.txt" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.json", "mine.txt"]


def test_pages_and_archives_contain_the_same_text(corpus: Path, tmp_path: Path) -> None:
    """HTML files and WARC archives of the same pages give the same documents."""
    (tmp_path / "few").mkdir()
    for page in sorted((corpus / "pages").iterdir())[:12]:
        (tmp_path / "few" / page.name).write_bytes(page.read_bytes())
    files, _ = run_recipe(
        Source("manuals", str(tmp_path / "few"), "PSF-2.0", 1.0, 1), tmp_path / "files"
    )
    archives, steps = run_recipe(
        Source("manuals", str(corpus / "web"), "PSF-2.0", 1.0, 2), tmp_path / "archives"
    )
    by_group = {row["group"]: row["text"] for row in archives}
    assert len(files) >= 3 and all(by_group[row["group"]] == row["text"] for row in files)
    assert len(by_group) == len(archives) > 80 and steps[0].total > 150


def test_help_pages_contain_no_data_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for name in ("os", "ftplib", "textwrap", "json"):
        page = standard_library.help_page(name)
        assert page is not None
        assert "hunter2" not in page and "0x7f" not in page
        assert str(Path(standard_library.__file__).parent) not in page
        assert standard_library.modules()[name].as_posix() not in page
    assert standard_library.help_page("no_such_module") is None
    assert "class <strong>JSONDecoder" not in standard_library.help_page("json"), (
        "defined in json.decoder, which has its own page"
    )


def test_a_module_belongs_to_one_source() -> None:
    modules = standard_library.modules()
    skipped = re.compile(r"\b(tests?|idlelib|site-packages)\b")
    assert len(modules) > 300 and not any(skipped.search(name) for name in modules)
    assert not standard_library.IMPORTABLE & {
        "this",
        "antigravity",
        "idlelib",
        "tkinter",
        "turtle",
        "test",
        "os",
        "sys",
    }
    by_source = {
        source: dict(standard_library.modules_of(source)) for source in ("web", "technical", "code")
    }
    assert sum(map(len, by_source.values())) == len(modules)
    assert set().union(*by_source.values()) == set(modules)
    for name in modules:
        top_level = name.split(".")[0]
        assert standard_library.source_of(name) == standard_library.source_of(top_level)
    assert all(name.split(".")[0] in standard_library.IMPORTABLE for name in by_source["web"])


def test_reference_pages_do_not_import_the_module() -> None:
    source = (
        'raise SystemExit\nclass A(int):\n    "About A."\n    def f(self, x=1) -> int:\n        '
        '"Gives x."\n'
    )
    page = standard_library.reference_page("m", '"""Head."""\n' + source)
    assert page == (
        "m\n=\n\nHead.\n\nclass A(int)\n    About A.\n\n    def f(self, x=1) -> int\n        "
        "Gives x.\n"
    )
    assert standard_library.reference_page("m", "x = 1") == ""


def test_texts_are_distinct() -> None:
    texts = [
        row["text"]
        for rows in (standard_library.chapters, standard_library.reference_pages)
        for row in rows()
        if row["text"]
    ]
    assert len(texts) > 100 and len(set(texts)) == len(texts)


def test_problems_are_correct_distinct_and_deterministic() -> None:
    rows = list(arithmetic.problems(400_000))
    assert rows[:50] == list(islice(arithmetic.problems(), 50))
    assert len({row["text"] for row in rows}) == len(rows) == len({row["group"] for row in rows})
    checked = 0
    for row in rows:
        for a, sign, b, c in re.findall(
            r"(?<![\d*+/] )\b(\d+) ([-+*]) (\d+) = (\d+)\b(?![./]| [-+*/])", row["text"]
        ):
            results = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}
            assert results[sign] == int(c), row["text"]
            checked += 1
    assert checked > 3000
