"""Text of any kind as it is: of pages the main text, and only what is nearly empty is dropped.

Documents longer than a two-hundredth of the input are split where a paragraph or a line ends, so
that parts of a single book can be held out.
"""

from dataclasses import replace
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data.config import Assets, Source
from data.readers.inputs import open_input
from data.readers.listing import read_pinned_list
from data.readers.web import PAGE_PACKAGES
from data.recipes.extraction import MainTextExtractor
from data.recipes.filters import BasicQualityFilter

REQUIRES = ("orjson", *PAGE_PACKAGES, "trafilatura", "lxml_html_clean")
RECIPE_VERSION = 1
PARTS = 200
PART_CHARACTERS = (200, 1_000_000)  # at least and at most


class LongDocumentSplitter(PipelineStep):
    """Splits documents into parts of about `characters`, each in a group of its own."""

    type = "SPLITTER"
    name = "Long documents"

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters = characters

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield documents, the long ones in parts."""
        for document in data:
            self.stat_update("total")
            parts = split(document.text, self.characters)
            self.stat_update("forwarded", value=len(parts))
            if len(parts) == 1:
                yield document
                continue
            self.stat_update("added", value=len(parts) - 1)
            for number, part in enumerate(parts):
                name = f"{document.id}/{number}"
                metadata = {**document.metadata, "group": name}
                yield replace(document, id=name, text=part, metadata=metadata)


def split(text: str, characters: int) -> list[str]:
    """Split a text at the ends of paragraphs, else of lines, into parts of about `characters`.

    The parts together are the text; a line stays whole.
    """
    parts = []
    start = 0
    while len(text) - start > 2 * characters:
        end = text.find("\n\n", start + characters, start + 2 * characters)
        if end < 0:
            end = text.find("\n", start + characters)
        if end < 0:
            break
        parts.append(text[start : end + 1])
        start = end + 1
    return [*parts, text[start:]]


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    reader = open_input(source, folder, allow_html=True)
    low, high = PART_CHARACTERS
    characters = min(high, max(low, read_pinned_list(folder)["bytes"] // PARTS))
    return [
        reader,
        *([MainTextExtractor()] if reader.has_pages else []),
        BasicQualityFilter(min_chars=20, min_letters=0.1, max_line=10**9),
        LongDocumentSplitter(characters),
    ]
