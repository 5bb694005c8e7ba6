"""Mathematics: collections of it (Proof-Pile-2), pages that a classifier takes for it, or worked arithmetic.

MinHash is refused here: datatrove maps every number to 0 before it hashes, and all problems of a kind would be one.
Exact substrings know numbers apart.
"""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data.config import Assets, InputError, Source
from data.recipes import arithmetic, web
from data.recipes.classifiers import Mathematical
from data.recipes.extraction import MainText
from data.recipes.filters import Plausible
from data.recipes.readers import HOST, Rows, Warc, open_input
from data.recipes.urls import blocklist

REQUIRES = (*web.REQUIRES,)
RECIPE_VERSION = 1


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`. Problems of the host are made to be clean.

    Web archives need the classifier; a folder of documents meets it where data.assets.math_classifier is set. Formulas
    have few letters, so only what is nearly all digits or signs is dropped.
    """
    if source.near_duplicates is not None:
        raise InputError("recipe mathematics: MinHash takes all numbers for one; set near_duplicates to null")
    if source.input == HOST:
        return [Rows(arithmetic.problems)]
    reader = open_input(source, folder, html=True)
    pipeline: list[PipelineStep] = [reader]
    classifier = assets.math_classifier.path
    if isinstance(reader, Warc):
        if classifier is None:
            raise InputError("recipe mathematics: web archives need data.assets.math_classifier.path, a fastText model")
        pipeline += [blocklist(assets.url_blocklist.path), MainText()]
    if classifier is not None:
        pipeline.append(Mathematical(classifier))
    return [*pipeline, Plausible(min_chars=100, min_letters=0.1, max_line=100_000)]
