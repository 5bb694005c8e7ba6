"""The body of a paper: TeX without preamble, comments and bibliography, text without its list of
references.

For TeX these are RedPajama's rules for arXiv (github.com/togethercomputer/RedPajama-Data, v1).
"""

import re

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

TEX = re.compile(r"\\documentclass|\\begin\{document\}|\\section\*?\{")
FIRST = re.compile(r"\\(?:begin\{abstract\}|chapter\*?\{|section\*?\{)")
LAST = re.compile(
    r"\\(?:appendix\b|begin\{references\}|begin\{thebibliography\}|bibliography\{|printbibliography)"
)
COMMENT_LINE = re.compile(r"^[ \t]*%.*\n?", re.MULTILINE)
COMMENT = re.compile(r"(?<!\\)%.*")
REFERENCES = re.compile(
    r"\n[ \t#*]*(?:\d+\.?\s+)?(?:references|bibliography|literature cited)[ \t:*]*\n", re.IGNORECASE
)
LATE = 0.5  # a heading of references in the first half is part of the text


def tex_body(text: str) -> str:
    """From the first heading to the bibliography, without comments; empty without a heading."""
    first = FIRST.search(text)
    if first is None:
        return ""
    body = text[first.start() :]
    last = LAST.search(body)
    body = body if last is None else body[: last.start()]
    return COMMENT.sub("", COMMENT_LINE.sub("", body)).strip()


def plain_body(text: str) -> str:
    """Text up to the last heading of references in its second half."""
    headings = [match.start() for match in REFERENCES.finditer(text)]
    return text[: headings[-1]] if headings and headings[-1] > LATE * len(text) else text


class PaperBody(BaseFilter):
    """Keeps the body only; a TeX file without any heading is no paper."""

    name = "Paper"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True with the text cut in place, or (False, reason)."""
        body = tex_body(doc.text) if TEX.search(doc.text) else plain_body(doc.text)
        if not body.strip():
            return False, "no_heading"
        doc.text = body
        return True
