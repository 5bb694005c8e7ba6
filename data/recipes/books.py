"""Books: full texts without licence texts, page numbers and hyphenation of the edition."""

import re
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from data.config import Assets, Source
from data.readers.inputs import open_input
from data.recipes.filters import BasicQualityFilter

REQUIRES = ("orjson", "spacy")
RECIPE_VERSION = 1
START = re.compile(r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)
END = re.compile(r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)
PAGE_NUMBER = re.compile(
    r"^[ \t]*(?:\[?(?:page |p\. ?)?\d{1,4}\]?|[ivxlc]{1,7})[ \t]*$\n?", re.MULTILINE | re.IGNORECASE
)
HYPHENATION = re.compile(r"(?<=[a-z])-\n(?=[a-z])")


class BookBody(BaseFilter):
    """Removes licence texts at both ends, page numbers, and hyphens at the end of lines."""

    name = "Book"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Clean the text in place; True, or (False, reason)."""
        text = doc.text
        if (start := START.search(text)) is not None:
            text = text[start.end() :]
        if (end := END.search(text)) is not None:
            text = text[: end.start()]
        doc.text = HYPHENATION.sub("", PAGE_NUMBER.sub("", text)).strip()
        return True if doc.text else (False, "empty")


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    # No rules on repeated lines: a paragraph may be one line, and verse has short lines.
    repetition = GopherRepetitionFilter(dup_line_frac=None, dup_line_char_frac=None)
    return [
        open_input(source, folder),
        BookBody(),
        BasicQualityFilter(1000, 0.5, 1_000_000),
        repetition,
    ]
