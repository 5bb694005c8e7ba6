"""Source code: files under permissive licences, without generated code and data.

File and line rules of The Stack and StarCoder (arXiv 2305.06161, section 3.1). The pass
near_duplicates removes near duplicates.
"""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.readers.inputs import open_input
from data.recipes.filters import BasicQualityFilter, CodeLineFilter, GeneratedCodeFilter
from data.recipes.licences import LicenceFilter

REQUIRES = ("orjson",)
# 2: licences are SPDX expressions
RECIPE_VERSION = 2
PERMISSIVE = "permissive"


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list.

    If the source's licence is "permissive", each file's own licence is checked; any other licence
    applies to all files.
    """
    columns = (*LicenceFilter.LICENCE_KEYS, *LicenceFilter.REPOSITORY_KEYS)
    pipeline: list[PipelineStep] = [open_input(source, folder, columns=columns)]
    if source.licence == PERMISSIVE:
        pipeline.append(LicenceFilter())
    return [
        *pipeline,
        GeneratedCodeFilter(),
        # lines above 1,000 characters and few letters mean data or minified code
        BasicQualityFilter(min_chars=100, min_letters=0.4, max_line=1000),
        CodeLineFilter(max_mean=100, min_alphanumeric=0.25),
    ]
