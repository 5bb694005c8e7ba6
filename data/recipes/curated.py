"""Curated text: collections chosen by hand, so only broken documents are dropped."""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.recipes.filters import Plausible
from data.recipes.readers import open_input

REQUIRES = ("orjson",)
RECIPE_VERSION = 1


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`."""
    return [open_input(source, folder), Plausible(min_chars=200, min_letters=0.5, max_line=100_000)]
