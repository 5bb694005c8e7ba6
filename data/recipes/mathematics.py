"""Mathematics: collections (Proof-Pile-2), worked problems, and pages selected by a classifier.

MinHash is refused: datatrove maps every number to 0 before hashing, so problems that differ only in
numbers would count as duplicates. Exact substrings distinguish numbers.
"""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from core.errors import InputError
from data.config import Assets, Source
from data.readers.inputs import open_input
from data.recipes import web
from data.recipes.classifiers import MathFilter
from data.recipes.extraction import MainTextExtractor
from data.recipes.filters import BasicQualityFilter
from data.recipes.urls import make_blocklist_filter

REQUIRES = (*web.REQUIRES,)
# 2: min_chars is 50, not 100, since a worked problem is often shorter than a paragraph
# 3: pages are decoded by their declared charset, in brotli and zstd too, and have status 2xx
RECIPE_VERSION = 3


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list.

    Web pages need the classifier; other documents are classified if data.assets.math_classifier
    is set. Formulas have few letters, so min_letters drops only tables of digits or signs.
    """
    if source.near_duplicates is not None:
        raise InputError(
            "recipe mathematics: MinHash treats all numbers as equal; set near_duplicates to null"
        )
    reader = open_input(source, folder, allow_html=True)
    pipeline: list[PipelineStep] = [reader]
    classifier = assets.math_classifier.path
    if reader.has_pages and classifier is None:
        raise InputError(
            "recipe mathematics: web pages need data.assets.math_classifier.path, a fastText model"
        )
    if "warc" in reader.kinds:
        pipeline.append(make_blocklist_filter(assets.url_blocklist.path))
    if reader.has_pages:
        pipeline.append(MainTextExtractor())
    if classifier is not None:
        pipeline.append(MathFilter(classifier))
    return [*pipeline, BasicQualityFilter(min_chars=50, min_letters=0.1, max_line=100_000)]
