"""Synthetic text (Cosmopedia), without refusals and repetitive documents."""

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


class RefusalFilter(BaseFilter):
    """Drops answers in which the model speaks of itself."""

    name = "Refusals"
    MARKERS = (
        "as an ai language model",
        "as a language model",
        "i cannot fulfill",
        "i can't assist with",
        "as an ai,",
    )

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        lowered = doc.text.lower()
        return (False, "refusal") if any(marker in lowered for marker in self.MARKERS) else True


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    # The pass near_duplicates removes texts of repeated prompts.
    return [
        open_input(source, folder),
        RefusalFilter(),
        BasicQualityFilter(200, 0.4, 100_000),
        GopherRepetitionFilter(),
    ]
