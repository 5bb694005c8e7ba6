r"""Body of a paper: TeX without preamble, comments and back matter, or text without references.

For TeX these are RedPajama's rules for arXiv (github.com/togethercomputer/RedPajama-Data, v1), by
TeX's grammar and in this order:

- A comment is % to the end of the line, the environment `comment`, or \iffalse to its \else or \fi.
  Literal text has no comments and no commands: \%, \verb, \lstinline, \mintinline, the address of
  \url, \href and \path, and the environments verbatim, Verbatim, lstlisting, minted, filecontents.
- Macros of \newcommand and \def that take no argument are replaced by their values.
- The body starts at the first heading outside of a preamble: an abstract, \part to \subparagraph
  (starred or not, spaces and an optional argument before the title), or one of plain TeX
  (\beginsection), harvmac (\newsec) and AMS-TeX (\head ... \endhead).
- It ends at \appendix, the references or the end of the document.

A text is TeX if its first command, before any word, sets up a document (\documentclass,
\documentstyle, \input, \def, ...) or is a heading; if \documentclass or \documentstyle has a line
of its own and \end{document} is last; or if two headings have lines of their own. Prose that only
mentions commands is prose.
"""

import re

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

MAX_VALUE = 200  # characters of a macro's value; bounds the growth of the text
SECTIONS = r"part|chapter|(?:sub)*section|(?:sub)?paragraph"
HEADING = (
    rf"\\(?:(?:{SECTIONS})\s*+(?:\*\s*+)?[\[{{]|begin\s*\{{abstract\}}|abstract\s*\{{"
    r"|(?:newsec|subsec)\s*\{|beginsection(?![a-zA-Z])|head(?:ing)?(?![a-zA-Z]).{0,200}\\endhead)"
)
# An alternative to the left wins, so an escaped character or literal text is passed as a whole
# before a % or a command inside of it can match.
LITERAL = (
    r"\\[^a-zA-Z]"
    r"|\\begin\s*\{(?P<name>(?:verbatim|Verbatim|lstlisting|minted|filecontents)\*?)\}"
    r"[\s\S]*?(?:\\end\s*\{(?P=name)\}|\Z)"
    r"|\\(?:(?:verb|lstinline)(?![a-zA-Z])\*?(?:\[[^\]\n]*\])?"
    r"|mintinline(?:\[[^\]\n]*\])?\{\w+\}|(?:url|path)(?=[|!+\"]))(?P<mark>[^\s{\[]).*?(?P=mark)"
    r"|\\(?:lstinline(?:\[[^\]\n]*\])?|mintinline(?:\[[^\]\n]*\])?\{\w+\}"
    r"|(?:url|nolinkurl|href|path)\s*)\{(?:[^{}]|\{[^{}]*\})*+\}"
    r"|^```\w*[ \t]*\n[\s\S]*?(?:^```[ \t]*$|\Z)"  # prose of today: Markdown
)
# \iff is a sign and \ifthenelse has no \fi
CONDITION = r"\\if(?!f(?![a-zA-Z])|thenelse)[a-zA-Z@]*+"
FI = r"\\fi(?![a-zA-Z@])"
BRANCH = rf"(?:{CONDITION}(?:(?!{CONDITION}|{FI})[\s\S])*+{FI}|(?!{CONDITION}|{FI})[\s\S])"
COMMENT = (
    r"^[ \t]*%.*\n?|%.*"
    r"|\\begin\s*\{comment\}[\s\S]*?(?:\\end\s*\{comment\}|\Z)"
    rf"|\\iffalse(?![a-zA-Z])(?:(?!\\else(?![a-zA-Z])){BRANCH})*+"
    rf"(?:{FI}|\\else(?P<otherwise>{BRANCH}*+){FI})"
)
CHARACTER = r"[^{}\\\n]|\\."
GROUP = rf"\{{(?:{CHARACTER}|\{{(?:{CHARACTER}|\{{(?:{CHARACTER})*+\}})*+\}})*+\}}"
DEFINITION = (
    r"\\(?:newcommand\s*+(?:\*\s*+)?(?:\{\s*+)?|def\s*+)\\(?P<defined>[a-zA-Z]+)\s*+(?:\}\s*+)?"
    + f"(?P<value>{GROUP})"
)
LITERALS = re.compile(LITERAL, re.MULTILINE)
COMMENTS = re.compile(f"(?P<kept>{LITERAL})|{COMMENT}", re.MULTILINE)
COMMAND = re.compile(r"\\(?P<command>[a-zA-Z]+)")
MACROS = re.compile(f"{LITERAL}|{DEFINITION}|{COMMAND.pattern}", re.MULTILINE)
KEPT_COMMANDS = re.compile(rf"{SECTIONS}|abstract|appendix|\w*bibliography|begin|end|document\w+")
PREAMBLE = re.compile(
    r"\\document(?:class|style)(?![a-zA-Z])"
    r"(?:(?!\\document(?:class|style))[\s\S])*?\\begin\s*\{document\}"
)
FIRST_HEADING = re.compile(HEADING)
BACK_MATTER = re.compile(
    r"\\(?:(?:appendix|printbibliography|listrefs|bye)(?![a-zA-Z])|bibliography\s*\{"
    r"|begin\s*\{(?:references|thebibliography|appendix|appendices)\}|end\s*\{document\})",
    re.IGNORECASE,
)
FIRST_COMMAND = re.compile(
    rf"\s*+(?:{HEADING}"
    r"|\\(?:document(?:class|style)|(?:re)?newcommand|usepackage|RequirePackage|def|let|font|title"
    r"|author|label|magnification|[hv]size|nopagenumbers|input|include)[ \t]*(?:[\[{\\=\d*]|$)"
    r"|\\(?:input|magnification)[ \t]+\S+[ \t]*$|\\begin\s*\{document\})",
    re.MULTILINE,
)
DOCUMENT_LINE = re.compile(
    r"^\\document(?:class|style)\s*+(?:\[[^\]]{0,2000}\]\s*+)?\{[^{}\n]*\}[ \t]*$", re.MULTILINE
)
DOCUMENT_END = re.compile(r"\\(?:end\s*\{document\}|bye)\s*\Z")
HEADING_LINE = re.compile(rf"^{HEADING}.*\}}[ \t]*$", re.MULTILINE)
REFERENCES = re.compile(
    r"\n[ \t#*]*(?:\d+\.?\s+)?(?:references|bibliography|literature cited)[ \t:*]*\n", re.IGNORECASE
)
MIN_REFERENCES_POSITION = 0.5  # a heading in the first half of the text belongs to it


def strip_comments(text: str) -> str:
    """Text without TeX's comments; a comment that fills its line goes with the line's end."""
    return COMMENTS.sub(
        lambda match: match["kept"] or strip_comments(match["otherwise"] or ""), text
    )


def mask(text: str) -> str:
    """Text of the same length in which literal text is x, so that a search finds only commands."""
    return LITERALS.sub(lambda match: re.sub(r"[^\n]", "x", match[0]), text)


def is_tex(masked: str) -> bool:
    """Whether a text without comments and literal text is TeX, not prose about TeX."""
    if FIRST_COMMAND.match(masked) is not None:
        return True
    if DOCUMENT_LINE.search(masked) is not None and DOCUMENT_END.search(masked) is not None:
        return True
    return len(HEADING_LINE.findall(masked)) > 1


def expand_macros(text: str) -> str:
    """Replace macros without arguments; a value uses the macros that are defined before it."""
    values: dict[str, str] = {}

    def expand(match: re.Match[str]) -> str:
        return values.get(match["command"] or "", match[0])

    for match in MACROS.finditer(text):
        name = match["defined"]
        if name is not None and KEPT_COMMANDS.fullmatch(name) is None:
            value = COMMAND.sub(expand, match["value"][1:-1])
            if len(value) <= MAX_VALUE:
                values[name] = value
    return MACROS.sub(expand, text) if values else text


def tex_body(text: str) -> str:
    """From the first heading to the back matter of a text without comments; "" without one."""
    text = expand_macros(text)
    masked = PREAMBLE.sub(lambda match: "x" * len(match[0]), mask(text))
    heading = FIRST_HEADING.search(masked)
    if heading is None:
        return ""
    end = BACK_MATTER.search(masked, heading.start())
    return text[heading.start() : None if end is None else end.start()].strip()


def plain_body(text: str) -> str:
    """Text up to the last references heading, if that is in the second half."""
    headings = [match.start() for match in REFERENCES.finditer(text)]
    if headings and headings[-1] > MIN_REFERENCES_POSITION * len(text):
        return text[: headings[-1]]
    return text


class PaperBody(BaseFilter):
    """Keeps only the body; drops TeX files without a heading, such as lists of \\input."""

    name = "Paper"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Replace the text by its body; True, or (False, reason)."""
        stripped = strip_comments(doc.text)
        body = tex_body(stripped) if is_tex(mask(stripped)) else plain_body(doc.text)
        if not body.strip():
            return False, "no_heading"
        doc.text = body
        return True
