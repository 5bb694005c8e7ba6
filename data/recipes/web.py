"""Web pages as RefinedWeb: address, main text, language, repetition, quality, line-wise
corrections.

Near duplicates (near_duplicates: 14x8 or, as RefinedWeb, 93x15) and exact substrings
(exact_substrings: 50) follow as passes over all documents, where the source asks for them.
"""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

from data.config import Assets, Source
from data.recipes.classifiers import English
from data.recipes.extraction import MainText
from data.recipes.lines import LineCorrections
from data.recipes.readers import Warc, open_input
from data.recipes.urls import blocklist

# Checked in the parent before the first document. Without lxml_html_clean, or without spacy's word
# splitter, datatrove counts every page as a timeout or fails in the middle, and reports success.
# pylibmagic comes before magic: it brings the system library that magic looks for.
REQUIRES = ("orjson", "warcio", "pylibmagic", "magic", "trafilatura", "lxml_html_clean", "spacy",
            "fasttext", "tldextract", "ahocorasick", "xxhash")  # fmt: skip
RECIPE_VERSION = 1
ASSETS = ("language_model",)


def preload(source: Source, assets: Assets) -> None:
    """Load the block lists in the process that forks the workers."""
    blocklist(assets.url_blocklist.path)


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; nothing is written to `folder`.

    Only pages of archives have addresses to judge; text that is extracted already (jsonl, parquet)
    meets all rules but the address's.
    """
    reader = open_input(source, folder, html=True)
    pipeline: list[PipelineStep] = [reader]
    if isinstance(reader, Warc):
        pipeline.append(blocklist(assets.url_blocklist.path))
    if reader.holds_html:
        pipeline.append(MainText())
    pipeline += [
        English(str(assets.language_model.path)),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
    ]
    return [*pipeline, LineCorrections()]
