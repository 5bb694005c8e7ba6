"""Manuals and references of programs: HTML files or web archives, kept where prose explains terms
and signatures.

Gopher's published values (datatrove's defaults, recipe web) hold for crawls. Pages of documentation
repeat signatures and list terms, and the word splitter counts every bracket as a word without
letters: those values, in brackets below, drop nearly all of them.
"""

from pathlib import Path
from urllib.parse import urlsplit

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from data.config import Assets, Source
from data.recipes.extraction import MainText
from data.recipes.readers import open_input

REQUIRES = (
    "orjson",
    "warcio",
    "pylibmagic",
    "magic",
    "trafilatura",
    "lxml_html_clean",
    "spacy",
    "xxhash",
)
RECIPE_VERSION = 1
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
    "max_non_alpha_words_ratio": 0.4,  # the least share of words with a letter [0.8]
    "min_stop_words": 1,  # [2]
}


class PageName(BaseFilter):
    """Groups pages by file name, so that all versions of a manual's page are in one split."""

    name = "Page name"

    def filter(self, doc: Document) -> bool:
        """True, with the group set."""
        path = urlsplit(doc.metadata.get("url") or doc.id).path
        doc.metadata.setdefault("group", path.rsplit("/", 1)[-1].removesuffix(".html"))
        return True


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`."""
    reader = open_input(source, folder, html=True)
    text: list[PipelineStep] = [MainText(), PageName()] if reader.holds_html else []
    return [reader, *text, GopherRepetitionFilter(**REPETITION), GopherQualityFilter(**QUALITY)]
