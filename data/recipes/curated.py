"""Curated text: collections chosen by hand, so only broken documents are dropped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.recipes.filters import Plausible
from data.recipes.readers import HOST, Rows, open_input

REQUIRES = ("orjson",)
RECIPE_VERSION = 1


def host_topics() -> Iterator[dict[str, Any]]:
    """Chapters of the language reference that the interactive help carries."""
    from pydoc_data.topics import topics

    # "if" and "else" are one chapter under two names; twice, it could be trained on and held out.
    names = {text: name for name, text in sorted(topics.items(), reverse=True)}
    for text, name in sorted(names.items(), key=lambda item: item[1]):
        yield {"id": name, "text": text, "group": f"topic {name}"}


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`."""
    reader = Rows(host_topics) if source.input == HOST else open_input(source, folder)
    return [reader, Plausible(min_chars=200, min_letters=0.5, max_line=100_000)]
