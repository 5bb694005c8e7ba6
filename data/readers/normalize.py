"""One form for the characters of every document: line ends, invisible and broken characters.

- Whatever `str.splitlines` takes for a line end becomes a line feed, except the form feed, which
  ends pages in books and in source files.
- Removed: control characters, zero-width spaces (also the byte order mark and the word joiner) and
  soft hyphens; a soft hyphen at the end of a line is the hyphen that a reader sees there.
- Kept: joiners and variation selectors, which Indic scripts, Persian and emoji need, and marks of
  direction.
- Halves of surrogate pairs are joined, and lone ones become U+FFFD, since UTF-8 cannot hold them.
- The Unicode form stays as it is: source code and tests name characters literally, NFC replaces
  some (the ohm and angstrom signs, CJK compatibility characters), and NFKC breaks formulas.
"""

import re

# all of ASCII that text may hold; then what other ranges hold, without the characters named above
ASCII = "\n\t\x0c\x20-\x7e"
REST = (
    "\xa0-\xac\xae-\u200a\u200c-\u2027\u202a-\u205f\u2061-\ud7ff"
    "\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff"
)
CLEAN = re.compile(f"[{ASCII}{REST}]*")
ODD = re.compile(f"[^{ASCII}{REST}]")
ODD_ASCII = bytes([*range(9), 11, *range(13, 32), 127])
LINE_ENDS = frozenset("\x0b\x1c\x1d\x1e\x85\u2028\u2029")
SURROGATE = re.compile("[\ud800-\udfff]")


def normalize(text: str) -> str:
    """Return a document's text with line feeds and without invisible and broken characters."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if is_clean(text):
        return text
    text = join_surrogates(text).replace("\xad\n", "-\n")
    return ODD.sub(lambda match: "\n" if match[0] in LINE_ENDS else "", text)


def is_clean(text: str) -> bool:
    """Whether no character has to be replaced; faster than a search for one."""
    if text.isascii():
        return len(text.encode().translate(None, ODD_ASCII)) == len(text)
    return CLEAN.fullmatch(text) is not None


def join_surrogates(text: str) -> str:
    """Return text that UTF-8 can hold: pairs joined, each lone surrogate replaced by U+FFFD."""
    if SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
