"""Technical prose: papers (arXiv TeX or text, PubMed), patents (USPTO), manuals, references."""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.readers.inputs import open_input
from data.recipes.filters import BasicQualityFilter
from data.recipes.papers import PaperBody

REQUIRES = ("orjson",)
# 2: TeX is read by its grammar, macros without arguments are replaced by their values
RECIPE_VERSION = 2


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    # max_line: a paragraph of a paper or a patent may be one line
    return [
        open_input(source, folder),
        PaperBody(),
        BasicQualityFilter(min_chars=200, min_letters=0.4, max_line=100_000),
    ]
