"""Source code: whole files under permissive licences, kept if a person wrote them.

File and line rules of The Stack's and StarCoder's cleaning (arXiv 2305.06161, section 3.1); near duplicates go in the
passes that follow (near_duplicates).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.recipes import host
from data.recipes.filters import Handwritten, Lines, Permissive, Plausible
from data.recipes.readers import HOST, Rows, open_input

REQUIRES = ("orjson",)
RECIPE_VERSION = 1
PERMISSIVE = "permissive"


def host_files() -> Iterator[dict[str, Any]]:
    """The standard library's modules that are read as code."""
    for name, path in host.modules_of("source_code"):
        # A few files declare an older encoding; what is not UTF-8 is replaced rather than lost.
        text = path.read_text(encoding="utf-8", errors="replace")
        yield {"id": name, "text": text, "group": name}


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`.

    A source with the licence "permissive" is judged file by file; any other holds for all of its files.
    """
    # Lines above 1,000 characters and few letters mean data or minified code.
    rules = [Handwritten(), Plausible(min_chars=100, min_letters=0.4, max_line=1000)]
    if source.input == HOST:
        return [Rows(host_files), *rules]
    licences = [Permissive()] if source.licence == PERMISSIVE else []
    return [open_input(source, folder), *licences, *rules, Lines(max_mean=100, min_alphanumeric=0.25)]
