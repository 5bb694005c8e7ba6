"""RefinedWeb's line-wise corrections: what a page says about itself is cut out of its text.

Rules of Penedo et al. 2023 (arXiv 2306.01116, table 6) as DCLM wrote them down
(baselines/baselines_configs/dclm_baseline_refinedweb.yaml).
"""

import re

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

MAX_UPPERCASE = 0.5  # share of a line's characters
SHORT_WORDS = 10  # only lines up to this long are edited
MAX_REMOVED = 0.05  # share of a document's words; above it the page is no article
COUNTER = re.compile(
    r"\W*\d[\d.,]*\s*[km]?\s+(likes?|shares?|comments?|retweets?|reposts?|quotes?|bookmarks?|upvotes?|downvotes?|"
    r"downloads?|views?|followers?)\W*",
    re.IGNORECASE,
)
NUMERIC = re.compile(r"[\d\W_]+")
EDITS = (
    (re.compile(r"^\W*sign[- ]in\b", re.IGNORECASE), "prefix"),
    (re.compile(r"\bread more\s*(\.\.\.|\u2026)?\s*$", re.IGNORECASE), "suffix"),
    (re.compile(r"\bitems in cart\b", re.IGNORECASE), "anywhere"),
)


def corrected(line: str) -> str | None:
    """The line, shortened where it ends or begins with furniture; None where all of it goes."""
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
        for pattern, _ in EDITS:
            line = pattern.sub("", line)
    return line if line.strip() else None


class LineCorrections(BaseFilter):
    """Cuts such lines out, and drops a document that loses more than MAX_REMOVED of its words."""

    name = "Lines"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True with the text corrected in place, or (False, reason)."""
        lines = doc.text.split("\n")
        kept = [better for line in lines if (better := corrected(line)) is not None]
        before, after = (sum(len(line.split()) for line in part) for part in (lines, kept))
        if before - after > MAX_REMOVED * before:
            return False, "many_bad_lines"
        doc.text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
        return True if doc.text else (False, "empty")
