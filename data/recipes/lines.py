"""RefinedWeb's line-wise corrections: removes page furniture such as counters and menu entries.

Rules of Penedo et al. 2023 (arXiv 2306.01116, table 6) as implemented by DCLM
(baselines/baselines_configs/dclm_baseline_refinedweb.yaml).
"""

import re

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

MAX_UPPERCASE = 0.5  # fraction of a line's characters
SHORT_WORDS = 10  # only lines of at most this many words are edited
MAX_REMOVED = 0.05  # fraction of a document's words; a page that loses more is not an article
COUNTER = re.compile(
    r"\W*\d[\d.,]*\s*[km]?\s+(likes?|shares?|comments?|retweets?|reposts?|quotes?|bookmarks?|upvotes?|downvotes?|"
    r"downloads?|views?|followers?)\W*",
    re.IGNORECASE,
)
NUMERIC = re.compile(r"[\d\W_]+")
REMOVED_PHRASES = (
    re.compile(r"^\W*sign[- ]in\b", re.IGNORECASE),
    re.compile(r"\bread more\s*(\.\.\.|\u2026)?\s*$", re.IGNORECASE),
    re.compile(r"\bitems in cart\b", re.IGNORECASE),
)


def correct_line(line: str) -> str | None:
    """Return the line without page furniture; None if nothing remains."""
    words = line.split()
    if not words:
        return line  # an empty line separates paragraphs
    uppercase = sum(c.isupper() for c in line)
    if (
        uppercase > MAX_UPPERCASE * len(line)
        or NUMERIC.fullmatch(line)
        or COUNTER.fullmatch(line)
        or len(words) == 1
    ):
        return None
    if len(words) <= SHORT_WORDS:
        for pattern in REMOVED_PHRASES:
            line = pattern.sub("", line)
    return line if line.strip() else None


class LineCorrectionFilter(BaseFilter):
    """Corrects all lines; drops a document that loses more than MAX_REMOVED of its words."""

    name = "Lines"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Correct the text in place; True, or (False, reason)."""
        lines = doc.text.split("\n")
        corrected = [new for line in lines if (new := correct_line(line)) is not None]
        words_before = sum(len(line.split()) for line in lines)
        words_after = sum(len(line.split()) for line in corrected)
        if words_before - words_after > MAX_REMOVED * words_before:
            return False, "many_bad_lines"
        doc.text = re.sub(r"\n{3,}", "\n\n", "\n".join(corrected)).strip()
        return True if doc.text else (False, "empty")
