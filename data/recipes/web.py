"""Web pages as in RefinedWeb: URL, main text, language, repetition, quality, line corrections.

Near duplicates (near_duplicates: 14x8, or 93x15 as in RefinedWeb) and exact substrings
(exact_substrings: 50) are separate passes over all documents, if the source sets them.
"""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

from data.config import Assets, Source
from data.readers.inputs import open_input
from data.readers.web import PAGE_PACKAGES
from data.recipes.classifiers import EnglishFilter
from data.recipes.extraction import MainTextExtractor
from data.recipes.lines import LineCorrectionFilter
from data.recipes.urls import load_blocklist, make_blocklist_filter

# Checked before the first document: without lxml_html_clean or spacy's word splitter, datatrove
# counts every page as a timeout or fails midway, and reports success.
REQUIRES = (*PAGE_PACKAGES, "trafilatura", "lxml_html_clean", "spacy", "fasttext", "tldextract",
            "ahocorasick", "xxhash")  # fmt: skip
# 2: pages are decoded by their declared charset, in brotli and zstd too, and have status 2xx
RECIPE_VERSION = 2
ASSETS = ("language_model",)


def preload(source: Source, assets: Assets) -> None:
    """Load the block lists in the process that forks the workers."""
    load_blocklist(assets.url_blocklist.path)


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list.

    Only pages of web archives have a URL to filter by; extracted text (jsonl, parquet, text files)
    skips the URL filter and Trafilatura.
    """
    reader = open_input(source, folder, allow_html=True)
    pipeline: list[PipelineStep] = [reader]
    if "warc" in reader.kinds:
        pipeline.append(make_blocklist_filter(assets.url_blocklist.path))
    if reader.has_pages:
        pipeline.append(MainTextExtractor())
    pipeline += [
        EnglishFilter(str(assets.language_model.path)),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        LineCorrectionFilter(),
    ]
    return pipeline
