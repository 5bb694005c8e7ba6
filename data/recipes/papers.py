"""Body of a paper: TeX without preamble, comments and bibliography, or text without references.

For TeX these are RedPajama's rules for arXiv (github.com/togethercomputer/RedPajama-Data, v1).
"""

import re

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

TEX = re.compile(r"\\documentclass|\\begin\{document\}|\\section\*?\{")
FIRST_HEADING = re.compile(r"\\(?:begin\{abstract\}|chapter\*?\{|section\*?\{)")
BACK_MATTER = re.compile(
    r"\\(?:appendix\b|begin\{references\}|begin\{thebibliography\}|bibliography\{|printbibliography)"
)
COMMENT_LINE = re.compile(r"^[ \t]*%.*\n?", re.MULTILINE)
COMMENT = re.compile(r"(?<!\\)%.*")
REFERENCES = re.compile(
    r"\n[ \t#*]*(?:\d+\.?\s+)?(?:references|bibliography|literature cited)[ \t:*]*\n", re.IGNORECASE
)
MIN_REFERENCES_POSITION = 0.5  # a heading in the first half of the text belongs to it


def tex_body(text: str) -> str:
    """Text from the first heading to the bibliography, without comments; "" without a heading."""
    heading = FIRST_HEADING.search(text)
    if heading is None:
        return ""
    body = text[heading.start() :]
    back_matter = BACK_MATTER.search(body)
    if back_matter is not None:
        body = body[: back_matter.start()]
    return COMMENT.sub("", COMMENT_LINE.sub("", body)).strip()


def plain_body(text: str) -> str:
    """Text up to the last references heading, if that is in the second half."""
    headings = [match.start() for match in REFERENCES.finditer(text)]
    if headings and headings[-1] > MIN_REFERENCES_POSITION * len(text):
        return text[: headings[-1]]
    return text


class PaperBody(BaseFilter):
    """Keeps only the body; drops TeX files without a heading."""

    name = "Paper"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Replace the text by its body; True, or (False, reason)."""
        body = tex_body(doc.text) if TEX.search(doc.text) else plain_body(doc.text)
        if not body.strip():
            return False, "no_heading"
        doc.text = body
        return True
