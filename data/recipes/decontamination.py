"""Leaving out what the evaluations ask: documents that share 13 words in a row with one of their
texts.

The rule of GPT-3 (Brown et al. 2020, appendix C) with whole documents dropped. The evaluations'
n-grams stay in memory: 8 bytes and a set's overhead each, about 100 MB per million; they grow with
the evaluations, not with the corpus.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from core.errors import InputError

VERSION = 1  # raised with what it drops
N = 13
WORD = re.compile(r"\w+")


def grams(text: str) -> Iterator[int]:
    """A 64-bit hash of every run of N words, without case and punctuation."""
    words = WORD.findall(text.lower())
    for start in range(len(words) - N + 1):
        run = " ".join(words[start : start + N])
        yield int.from_bytes(blake2b(run.encode(), digest_size=8).digest(), "little")


def strings(value: object) -> Iterator[str]:
    """All text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


@lru_cache(maxsize=2)
def forbidden(path: str) -> frozenset[int]:
    """N-grams of a jsonl file: of every string in every row, whatever its key."""
    found: set[int] = set()
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"{path}:{number} is no JSON ({error}): mend data.assets.evaluations"
                ) from error
            for text in strings(row):
                found.update(grams(text))
    if not found:
        raise InputError(
            f"{path} has no text of {N} words: set data.assets.evaluations.path to the "
            "evaluations' texts"
        )
    return frozenset(found)


class Uncontaminated(BaseFilter):
    """Drops a document that shares an n-gram with the evaluations."""

    name = "Decontamination"

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        known = forbidden(self.path)
        return (
            (False, "evaluation_text") if any(gram in known for gram in grams(doc.text)) else True
        )
