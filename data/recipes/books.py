"""Books: full texts without the notices, page numbers and hyphenation of the edition.

Notices are Project Gutenberg's, of each of its ages. A header ends at the line

    *END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*      (1990s)
    *** START OF THIS PROJECT GUTENBERG EBOOK TITLE ***                   (2000s; THE: today)

and credits ("Produced by ...") or a transcriber's note in brackets may follow it. A footer starts
at "*** END OF THE PROJECT GUTENBERG EBOOK ...", at "End of (the) Project Gutenberg's ...", or at
the licence. Spaces, the case, THE or THIS, EBOOK or ETEXT differ, and a title may have two lines.

A book may quote these lines, so a part is cut only if it is at an end of the text (MAX_NOTICE
characters) and is short (MAX_UNNAMED) or has the words of a notice.
"""

import re
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from data.config import Assets, Source
from data.readers.inputs import open_input
from data.recipes.filters import BasicQualityFilter

REQUIRES = ("orjson", "spacy")
# 2: notices of every age of Project Gutenberg, and none that a book quotes
RECIPE_VERSION = 2
MAX_NOTICE = 40_000  # characters; headers of the 1990s with the small print have up to 30,000
MAX_UNNAMED = 500  # characters that are cut at a mark although they do not name the project
LINES = re.IGNORECASE | re.MULTILINE
EDITION = r"(?:THE|THIS)\s+(?:COPYRIGHTED\s+)?PROJECT\s+GUTENBERG"
# the rest of the line, or of the paragraph if the mark is closed there
TITLE = r"(?:[^*\n]*(?:\n[^*\n]+){0,3}\*\*\*[^\n]*|[^\n]*)"
HEADER_ENDS = (
    re.compile(rf"^[ \t]*\*{{3}}[ \t]*START OF {EDITION}{TITLE}", LINES),
    re.compile(r"^[ \t]*\*+[ \t]*END[ \t]*\*?[ \t]*THE SMALL PRINT![^\n]*", LINES),
)
END = re.compile(rf"^[ \t]*\*{{3}}[ \t]*END OF {EDITION}", LINES)
END_SENTENCE = re.compile(
    r"^[ \t]*\W{0,5}(?:END OF|ENDE|FIN D[EU])(?: THE| THIS| DIESES)? PROJE[CK]?T GUTENBERG", LINES
)
LICENCE = re.compile(
    r"^[ \t]*(?:\*{3}[ \t]*START: FULL LICEN[SC]E|\*+[ \t]*START[ \t]*\**[ \t]*THE SMALL PRINT!"
    r"|THE FULL PROJECT GUTENBERG\S{0,4} LICEN[SC]E"
    r"|Updated editions will replace the previous)",
    LINES,
)
NOTICE = re.compile(
    r"project gutenberg(?:'s|\u2019s|-tm|\u2122|\(tm\))*\s+(?:e-?text|e-?book|licen[sc]e|literary)"
    r"|for the use of anyone anywhere|small print!|full licen[sc]e"
    r"|copyright laws are changing|this file should be named",
    re.IGNORECASE,
)
CREDITS = re.compile(
    r"\s*(?:(?:this )?(?:project gutenberg )?(?:e-?text|e-?book|html version)(?: was| is)? ?"
    r"(?:produced|prepared|created|scanned|transcribed)|produced|prepared|transcribed) by\b"
    r"[^\n]*(?:\n[^\n]+){0,7}(?=\n\n|\n?\Z)"
    # above its editions of 2005 to 2015
    r"|\s*(?:from (?:page )?images\s+(?:generously\s+)?made available|note: project gutenberg also"
    r"|images of the original pages are available)\b[^\n]*(?:\n[^\n]+){0,9}(?=\n\n|\n?\Z)"
    r"|\s*\[transcriber['\u2019]?s['\u2019]? notes?:?[^\[\]]{0,2000}\]",
    re.IGNORECASE,
)
PAGE_NUMBER = re.compile(
    r"^[ \t]*(?:\[?(?:page |p\. ?)?\d{1,4}\]?"
    r"|(?=[ivxlc])c{0,3}(?:xc|xl|l?x{0,3})(?:ix|iv|v?i{0,3}))[ \t]*$\n?",  # no "civil", "ill"
    LINES,
)
HYPHENATION = re.compile(r"(?<=[a-z])-\n(?=[a-z])")


def is_notice(part: str) -> bool:
    """Whether the text before a header's end, or after a footer's first line, is no book."""
    return len(part) <= MAX_UNNAMED or NOTICE.search(part) is not None


def cut_header(text: str) -> str:
    """Text after the header, and after the credits that follow one."""
    has_header = False
    for mark in HEADER_ENDS:
        match = mark.search(text, 0, MAX_NOTICE)
        if match is not None and is_notice(text[: match.start()]):
            text = text[match.end() :]
            has_header = True
    while has_header and (credits := CREDITS.match(text)) is not None:
        text = text[credits.end() :]
    return text


def cut_footer(text: str) -> str:
    """Text before the footer.

    Of several end marks the last is the edition's own; a licence has several headings.
    """
    for mark, position in ((END, -1), (END_SENTENCE, -1), (LICENCE, 0)):
        matches = list(mark.finditer(text, max(0, len(text) - MAX_NOTICE)))
        if matches and is_notice(text[matches[position].end() :]):
            text = text[: matches[position].start()]
    return text


class BookBody(BaseFilter):
    """Removes notices at both ends, page numbers, and hyphens at the end of lines."""

    name = "Book"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Clean the text in place; True, or (False, reason)."""
        text = cut_footer(cut_header(doc.text))
        doc.text = HYPHENATION.sub("", PAGE_NUMBER.sub("", text)).strip()
        return True if doc.text else (False, "empty")


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Return the steps that clean `source`; `folder` has its pinned input list."""
    # No rules on repeated lines: a paragraph may be one line, and verse has short lines.
    repetition = GopherRepetitionFilter(dup_line_frac=None, dup_line_char_frac=None)
    return [
        open_input(source, folder),
        BookBody(),
        BasicQualityFilter(1000, 0.5, 1_000_000),
        repetition,
    ]
