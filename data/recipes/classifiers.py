"""Filters by fastText models: the language of a page, and whether it is mathematics."""

from functools import lru_cache
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from core.errors import InputError

MIN_LANGUAGE_SCORE = 0.65  # RefinedWeb's threshold for CCNet's model
MATH_LABEL = "math"
MIN_MATH_SCORE = 0.5  # assumed: the paper names the kind of classifier and no threshold


@lru_cache(maxsize=4)
def load_model(path: str) -> Any:
    """Load a fastText model once per process; raises InputError if the file is not a model."""
    from fasttext.FastText import _FastText  # fasttext.load_model prints a warning

    try:
        return _FastText(path)
    except ValueError as error:
        raise InputError(
            f"{path} is not a fastText model ({error}): remove it and run data/download.py again"
        ) from error


class FastTextFilter(BaseFilter):
    """Keeps documents whose score for a label is at least `min_score`; saves it as metadata."""

    name = "Classifier"

    def __init__(self, path: str, label: str, min_score: float, reason: str) -> None:
        super().__init__()
        load_model(path)  # an error before the first document
        self.path = path
        self.label = label
        self.min_score = min_score
        self.reason = reason

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        # The inner predict: older wheels' wrapper converts with numpy's copy=False, which numpy 2
        # refuses.
        line = doc.text.replace("\n", " ") + "\n"
        scores = load_model(self.path).f.predict(line, -1, 0.0, "strict")
        score = next(
            (float(score) for score, name in scores if name == f"__label__{self.label}"), 0.0
        )
        doc.metadata[f"{self.label}_score"] = round(score, 4)
        return True if score >= self.min_score else (False, self.reason)


class EnglishFilter(FastTextFilter):
    """Keeps English pages by CCNet's language identification, as RefinedWeb does."""

    name = "Language"

    def __init__(self, path: str) -> None:
        super().__init__(path, "en", MIN_LANGUAGE_SCORE, "not_english")


class MathFilter(FastTextFilter):
    """Keeps pages of a crawl that are like Proof-Pile."""

    name = "Mathematical"

    def __init__(self, path: str) -> None:
        super().__init__(path, MATH_LABEL, MIN_MATH_SCORE, "not_math")
