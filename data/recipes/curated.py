"""Curated text: hand-picked collections, of which only broken documents are dropped."""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.readers.inputs import open_input
from data.recipes.filters import BasicQualityFilter

REQUIRES = ("orjson",)
RECIPE_VERSION = 1


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    return [
        open_input(source, folder),
        BasicQualityFilter(min_chars=200, min_letters=0.5, max_line=100_000),
    ]
