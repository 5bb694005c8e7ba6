"""Write the demo's raw text: what every Python carries, as the files that a corpus of your own
would be.

    FOLDER/web/*.warc.gz      help pages of standard modules, as a crawl
    FOLDER/pages/*.html       the same pages as files, to try recipe manuals on
                              (data.sources.web.input=FOLDER/pages)
    FOLDER/code/*.jsonl       standard modules, a row per file
    FOLDER/technical/*.jsonl  reference pages of other modules
    FOLDER/curated/*.jsonl    chapters of the language reference
    FOLDER/math/*.jsonl       worked arithmetic

Two files a kind, which two tasks read. Nothing is done where the same Python has written them
before.
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from core.errors import USER_ERROR
from examples.demo_corpus import arithmetic, standard_library
from examples.demo_corpus.archives import write_archive

FILES = 2  # of a kind
VERSION = 1  # raised with what is written
KINDS = ("web", "pages", "code", "technical", "curated", "math")  # a folder each
RECORD = "made.json"
EXAMPLES = """examples:
  python examples/make_demo_corpus.py
  python examples/make_demo_corpus.py /data/demo/raw
  python data/prepare.py +experiment=demo data.folder=/data/demo
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=format_commands("python examples/make_demo_corpus.py"),
        description=__doc__,
        epilog=format_commands(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/data/demo/raw"))
    folder: Path = parser.parse_args().folder
    made_by = {"version": VERSION, "python": platform.python_version()}
    record = folder / RECORD
    strangers = (
        {path.name for path in folder.iterdir()} - {RECORD, *KINDS} if folder.is_dir() else set()
    )
    if strangers:
        print(
            f"error: {folder} holds {min(strangers)}, and would be replaced: name a new folder",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == made_by:
        print(f"reused: {folder} was written by this Python")
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    (part / RECORD).write_text(json.dumps(made_by) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB of raw text by Python {platform.python_version()}")


def write(folder: Path) -> None:
    """A folder of every kind."""
    pages = list(standard_library.help_pages())
    (folder / "pages").mkdir()
    for name, html in pages:
        if html is not None:
            (folder / "pages" / f"{name}.html").write_text(html, encoding="utf-8", errors="replace")
    (folder / "web").mkdir()
    for number in range(FILES):
        with (folder / "web" / f"{number:05d}.warc.gz").open("wb") as file:
            some = (
                (f"http://host.invalid/{name}.html", html)
                for name, html in pages[number::FILES]
                if html
            )
            write_archive(file, some)
    kinds: dict[str, Iterable[standard_library.Row]] = {
        "code": standard_library.code_files(),
        "technical": standard_library.reference_pages(),
        "curated": standard_library.chapters(),
        "math": arithmetic.problems(),
    }
    for kind, made in kinds.items():
        rows = list(made)
        (folder / kind).mkdir()
        for number in range(FILES):
            with (folder / kind / f"{number:05d}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in islice(rows, number, None, FILES))


if __name__ == "__main__":
    main()
