"""Software manuals and references, from HTML files or web archives.

Gopher's published thresholds (datatrove's defaults, recipe web) are for crawls. They drop nearly
all documentation, since it repeats signatures, lists terms, and the word splitter counts every
bracket as a word without letters. The published values are in brackets below.
"""

from pathlib import Path
from urllib.parse import urlsplit

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from data.config import Assets, Source
from data.readers.base import IS_PAGE
from data.readers.inputs import open_input
from data.readers.web import PAGE_PACKAGES
from data.recipes.extraction import MainTextExtractor

REQUIRES = (*PAGE_PACKAGES, "trafilatura", "lxml_html_clean", "spacy", "xxhash")
# 2: pages are decoded by their declared charset, in brotli and zstd too, and have status 2xx
RECIPE_VERSION = 2
REPETITION = {
    "dup_line_frac": 0.4,  # [0.3]
    "dup_line_char_frac": 0.3,  # [0.2]
    "dup_n_grams": (
        (5, 0.45),
        (6, 0.4),
        (7, 0.35),
        (8, 0.3),
        (9, 0.25),
        (10, 0.2),
    ),  # [0.15 ... 0.10]
}
QUALITY = {
    # despite the name, the minimum fraction of words with a letter
    "max_non_alpha_words_ratio": 0.4,  # [0.8]
    "min_stop_words": 1,  # [2]
}


class PageNameGrouper(BaseFilter):
    """Groups pages by file name, so that all versions of a manual page are in one split."""

    name = "Page name"

    def filter(self, doc: Document) -> bool:
        """Set a page's group; always True."""
        if not doc.metadata.get(IS_PAGE):
            return True
        path = urlsplit(doc.metadata.get("url") or doc.id).path
        doc.metadata.setdefault("group", path.rsplit("/", 1)[-1].removesuffix(".html"))
        return True


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    reader = open_input(source, folder, allow_html=True)
    pipeline: list[PipelineStep] = [reader]
    if reader.has_pages:
        pipeline += [MainTextExtractor(), PageNameGrouper()]
    return [*pipeline, GopherRepetitionFilter(**REPETITION), GopherQualityFilter(**QUALITY)]
