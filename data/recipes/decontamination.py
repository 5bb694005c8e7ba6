"""Decontamination: drops documents that share a 13-gram of words with the evaluations.

The rule of GPT-3 (Brown et al. 2020, appendix C), but the whole document is dropped. Memory grows
with the evaluations, not with the corpus: about 100 MB per million n-grams.
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

VERSION = 1  # raise it when other documents are dropped
NGRAM_WORDS = 13
WORD = re.compile(r"\w+")


def ngram_hashes(text: str) -> Iterator[int]:
    """Yield a 64-bit hash of every n-gram of words, ignoring case and punctuation."""
    words = WORD.findall(text.lower())
    for start in range(len(words) - NGRAM_WORDS + 1):
        ngram = " ".join(words[start : start + NGRAM_WORDS])
        yield int.from_bytes(blake2b(ngram.encode(), digest_size=8).digest(), "little")


def iter_strings(value: object) -> Iterator[str]:
    """Yield every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from iter_strings(item)


@lru_cache(maxsize=2)
def evaluation_ngrams(path: str) -> frozenset[int]:
    """N-gram hashes of every string in every row of a jsonl file."""
    ngrams: set[int] = set()
    with Path(path).open("rb") as lines:
        for line_number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}:{line_number} is not JSON ({error}): fix data.assets.evaluations"
                ) from error
            for text in iter_strings(row):
                ngrams.update(ngram_hashes(text))
    if not ngrams:
        raise InputError(
            f"{path} has no text of {NGRAM_WORDS} words: set data.assets.evaluations.path to the "
            "evaluations' texts"
        )
    return frozenset(ngrams)


class DecontaminationFilter(BaseFilter):
    """Drops a document that shares an n-gram with the evaluations."""

    name = "Decontamination"

    def __init__(self, path: str) -> None:
        super().__init__()
        evaluation_ngrams(path)  # an error before the first document
        self.path = path

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        contaminated = not evaluation_ngrams(self.path).isdisjoint(ngram_hashes(doc.text))
        return (False, "evaluation_text") if contaminated else True
