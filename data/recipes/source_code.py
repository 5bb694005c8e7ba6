"""Source code: whole files under permissive licences, kept if a person wrote them.

File and line rules of The Stack's and StarCoder's cleaning (arXiv 2305.06161, section 3.1); near
duplicates go in the passes that follow (near_duplicates).
"""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.recipes.filters import Handwritten, Lines, Permissive, Plausible
from data.recipes.readers import open_input

REQUIRES = ("orjson",)
RECIPE_VERSION = 1
PERMISSIVE = "permissive"


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`.

    A source with the licence "permissive" is judged file by file; any other holds for all of its
    files.
    """
    # Lines above 1,000 characters and few letters mean data or minified code.
    rules = [Handwritten(), Plausible(min_chars=100, min_letters=0.4, max_line=1000)]
    licences = [Permissive()] if source.licence == PERMISSIVE else []
    return [
        open_input(source, folder),
        *licences,
        *rules,
        Lines(max_mean=100, min_alphanumeric=0.25),
    ]
