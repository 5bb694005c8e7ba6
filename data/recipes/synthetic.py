"""Text that a model wrote (Cosmopedia): kept unless it talks about itself or repeats."""

from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from data.config import Assets, Source
from data.recipes.filters import Plausible
from data.recipes.readers import open_input

REQUIRES = ("orjson", "spacy")
RECIPE_VERSION = 1


class Refusals(BaseFilter):
    """Drops answers in which the model speaks of itself in place of the subject."""

    name = "Refusals"
    MARKS = (
        "as an ai language model",
        "as a language model",
        "i cannot fulfill",
        "i can't assist with",
        "as an ai,",
    )

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        lowered = doc.text.lower()
        return (False, "refusal") if any(mark in lowered for mark in self.MARKS) else True


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; `folder` stays empty. near_duplicates drops prompt copies."""
    return [
        open_input(source, folder),
        Refusals(),
        Plausible(200, 0.4, 100_000),
        GopherRepetitionFilter(),
    ]
