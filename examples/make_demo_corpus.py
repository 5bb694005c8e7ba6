"""Write the demo's raw corpus from the text of Python's standard library.

    FOLDER/web/*.warc.gz      help pages of standard modules, as a crawl
    FOLDER/pages/*.html       the same pages as files, for the recipe `manuals`
                              (data.sources.web.input=FOLDER/pages)
    FOLDER/code/*.jsonl       standard modules, one row per file
    FOLDER/technical/*.jsonl  reference pages of other modules
    FOLDER/curated/*.jsonl    chapters of the language reference
    FOLDER/math/*.jsonl       worked arithmetic

Writes two files of each kind, so that two tasks can read them. Does nothing if the same version of
Python has already written the folder.
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from core.errors import USER_ERROR
from core.records import read_or_rebuild
from examples.demo_corpus import arithmetic, standard_library
from examples.demo_corpus.archives import write_archive

FILES_PER_KIND = 2
VERSION = 1  # increase when the output changes
KINDS = ("web", "pages", "code", "technical", "curated", "math")
RECORD = "made.json"
EXAMPLES = """examples:
  python examples/make_demo_corpus.py
  python examples/make_demo_corpus.py /data/demo/raw
  python data/prepare.py +experiment=demo data.folder=/data/demo
"""


def main() -> None:
    """Write the corpus to the folder of the command line."""
    parser = argparse.ArgumentParser(
        prog=format_commands("python examples/make_demo_corpus.py"),
        description=__doc__,
        epilog=format_commands(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/data/demo/raw"))
    folder: Path = parser.parse_args().folder
    provenance = {"version": VERSION, "python": platform.python_version()}
    record = folder / RECORD
    existing = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if unknown := existing - {RECORD, *KINDS}:
        print(
            f"error: {folder} would be replaced, but contains {min(unknown)}: name a new folder",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
    if read_or_rebuild(record, dict[str, Any], "the corpus is written again") == provenance:
        print(f"reused: this version of Python has written {folder}")
        return
    temp_folder = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temp_folder, ignore_errors=True)
    temp_folder.mkdir(parents=True)
    write_corpus(temp_folder)
    (temp_folder / RECORD).write_text(json.dumps(provenance) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temp_folder.rename(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB of raw text by Python {platform.python_version()}")


def write_corpus(folder: Path) -> None:
    """Write a subfolder of every kind."""
    pages = list(standard_library.help_pages())
    (folder / "pages").mkdir()
    for name, html in pages:
        if html is not None:
            (folder / "pages" / f"{name}.html").write_text(html, encoding="utf-8", errors="replace")
    (folder / "web").mkdir()
    for index in range(FILES_PER_KIND):
        with (folder / "web" / f"{index:05d}.warc.gz").open("wb") as file:
            archived = (
                (f"http://host.invalid/{name}.html", html)
                for name, html in pages[index::FILES_PER_KIND]
                if html
            )
            write_archive(file, archived)
    kinds: dict[str, Iterable[standard_library.Row]] = {
        "code": standard_library.code_files(),
        "technical": standard_library.reference_pages(),
        "curated": standard_library.chapters(),
        "math": arithmetic.problems(),
    }
    for kind, generated in kinds.items():
        rows = list(generated)
        (folder / kind).mkdir()
        for index in range(FILES_PER_KIND):
            with (folder / kind / f"{index:05d}.jsonl").open("w", encoding="utf-8") as file:
                for row in islice(rows, index, None, FILES_PER_KIND):
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
