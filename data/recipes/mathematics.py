"""Mathematics: collections of it (Proof-Pile-2), worked problems, pages that a classifier takes for
it.

MinHash is refused here: datatrove maps every number to 0 before it hashes, and all problems of a
kind would be one. Exact substrings know numbers apart.
"""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from core.errors import InputError
from data.config import Assets, Source
from data.recipes import web
from data.recipes.classifiers import Mathematical
from data.recipes.extraction import MainText
from data.recipes.filters import Plausible
from data.recipes.readers import Warc, open_input
from data.recipes.urls import blocklist

REQUIRES = (*web.REQUIRES,)
# 2: from 50 characters on and not 100, since a worked problem is often shorter than a paragraph
RECIPE_VERSION = 2


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`.

    Web pages need the classifier; a folder of documents meets it where data.assets.math_classifier
    is set. Formulas have few letters, so only what is nearly all digits or signs is dropped.
    """
    if source.near_duplicates is not None:
        raise InputError(
            "recipe mathematics: MinHash takes all numbers for one; set near_duplicates to null"
        )
    reader = open_input(source, folder, html=True)
    pipeline: list[PipelineStep] = [reader]
    classifier = assets.math_classifier.path
    if reader.holds_html and classifier is None:
        raise InputError(
            "recipe mathematics: web pages need data.assets.math_classifier.path, a fastText model"
        )
    if isinstance(reader, Warc):
        pipeline.append(blocklist(assets.url_blocklist.path))
    if reader.holds_html:
        pipeline.append(MainText())
    if classifier is not None:
        pipeline.append(Mathematical(classifier))
    return [*pipeline, Plausible(min_chars=50, min_letters=0.1, max_line=100_000)]
