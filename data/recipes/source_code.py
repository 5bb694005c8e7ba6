"""Source code: whole files, kept if a person wrote them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data.config import Source
from data.recipes import host
from data.recipes.filters import Handwritten, Plausible
from data.recipes.readers import HOST, Rows, open_input

REQUIRES = ("orjson",)


def host_files() -> Iterator[dict[str, Any]]:
    """The standard library's modules that are read as code."""
    for name, path in host.modules_of("source_code"):
        # A few files declare an older encoding; what is not UTF-8 is replaced rather than lost.
        text = path.read_text(encoding="utf-8", errors="replace")
        yield {"id": name, "text": text, "group": name}


def steps(source: Source, folder: Path) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`."""
    reader = Rows(host_files) if source.input == HOST else open_input(source.input, folder)
    # Lines above 1,000 characters and few letters mean data or minified code.
    return [reader, Handwritten(), Plausible(min_chars=100, min_letters=0.4, max_line=1000)]
