"""Filters that ask a fastText model: the language of a page, and whether it is mathematics."""

from functools import lru_cache
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from core.errors import InputError

MIN_LANGUAGE_SCORE = 0.65  # RefinedWeb's, of CCNet's model
# assumed: the paper names the kind of classifier and no threshold
MATH_LABEL, MIN_MATH_SCORE = ("math", 0.5)


@lru_cache(maxsize=4)
def model_of(path: str) -> Any:
    """A fastText model, loaded once a process; raises InputError when the file is none."""
    from fasttext.FastText import _FastText  # load_model prints a warning

    try:
        return _FastText(path)
    except ValueError as error:
        raise InputError(
            f"{path} is no fastText model ({error}): fetch it again (python data/download.py)"
        ) from error


class Labelled(BaseFilter):
    """Keeps documents that the model labels with at least a score; saves the score as metadata."""

    name = "Classifier"

    def __init__(self, path: str, label: str, least: float, reason: str) -> None:
        super().__init__()
        self.path = path
        self.label = label
        self.least = least
        self.reason = reason

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        # the inner predict: the wrapper converts with numpy's copy=False, which numpy 2 refuses in
        # older wheels
        found = model_of(self.path).f.predict(doc.text.replace("\n", " ") + "\n", -1, 0.0, "strict")
        score = next(
            (float(score) for score, name in found if name == f"__label__{self.label}"), 0.0
        )
        doc.metadata[f"{self.label}_score"] = round(score, 4)
        return True if score >= self.least else (False, self.reason)


class English(Labelled):
    """CCNet's language identification, as RefinedWeb used it."""

    name = "Language"

    def __init__(self, path: str) -> None:
        super().__init__(path, "en", MIN_LANGUAGE_SCORE, "not_english")


class Mathematical(Labelled):
    """Proof-Pile-like pages out of a crawl."""

    name = "Mathematical"

    def __init__(self, path: str) -> None:
        super().__init__(path, MATH_LABEL, MIN_MATH_SCORE, "not_math")
