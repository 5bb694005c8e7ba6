"""Decodes bytes of unknown encoding: the one place where bytes of the web become text.

The order is that of the WHATWG Encoding and HTML standards with two differences, both for pages
that lie. Bytes that are UTF-8, or nearly so, are UTF-8 whatever is declared: text in another
encoding is practically never valid UTF-8 by chance. And a declared encoding is dropped if the bytes
contradict it. docs/design/data-pipeline.md gives the reasons for the thresholds.
"""

import codecs
import re
from collections.abc import Iterator
from itertools import chain

BOMS = (
    (codecs.BOM_UTF8, None),  # the text after it is tested like any other
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # starts with the mark of UTF-16-LE
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
DECLARED_WITHIN = 1024  # bytes, as in browsers
COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
IN_DOCUMENT = re.compile(
    rb"""\A\s*<\?xml[^>]*?encoding\s*=\s*["']\s*([\w.:+-]+)"""
    rb"""|<meta[\s/][^>]*?charset\s*=\s*["']?\s*([\w.:+-]+)""",
    re.IGNORECASE,
)
IN_HEADER = re.compile(r"""charset\s*=\s*["']?\s*([\w.:+-]+)""", re.IGNORECASE)
WIDER = {"gbk": "gb18030"}  # the standard reads gbk with the decoder of gb18030
WEB_LABELS = {"UHC": "euc-kr"}  # of names by faust-cchardet
STATEFUL = "iso2022_jp"  # whose bytes are all ASCII
NO_TEXT = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f\ufffd]")  # controls, replaced bytes
NON_ASCII = re.compile("[^\0-\x7f]")
# UTF-8 is believed while valid sequences outnumber bad bytes, another encoding with few bad bytes
MAX_BAD_UTF8 = 0.5  # of the characters that are not ASCII
MAX_BAD = 0.1
MAX_NO_TEXT = 0.02  # of all characters; random bytes have 0.1 in any encoding
MIN_UTF16_NULS = 0.1  # of every second byte; markup and spaces have NULs in every script
MIN_STATISTICS = 16  # bytes that are not ASCII


def decode(raw: bytes, content_type: str | None = None) -> str | None:
    """Text of a page or text file; None if it is no text in any encoding that fits.

    `content_type` is the media type that came with the bytes, whose charset is tried before that of
    an XML declaration or a meta element. Single bytes that do not fit become U+FFFD.
    """
    for mark, codec in BOMS:
        if raw.startswith(mark):
            raw = raw[len(mark) :]
            if codec is not None:
                return keep_text(raw.decode(codec, "replace"))
            break
    if b"\0" in raw:
        codec = utf16_without_mark(raw)
        if codec is not None:
            return keep_text(raw.decode(codec, "replace"))
    elif b"\x1b" not in raw:  # else it may be ISO-2022-JP, or binary
        try:
            return raw.decode()
        except UnicodeDecodeError:
            pass
    return keep_text(decode_legacy(raw, content_type))


def decode_legacy(raw: bytes, content_type: str | None) -> str:
    """Decode bytes that are not plain UTF-8 by the first encoding that fits."""
    declared = [name for name in declared_encodings(raw, content_type) if name is not None]
    if b"\x1b" in raw and STATEFUL in (*declared, guess(raw)):
        return raw.decode(STATEFUL, "replace")
    text = raw.decode("utf-8", "replace")
    bad = text.count("\ufffd") - raw.count("\ufffd".encode())
    if "utf-8" in declared and text.endswith("\ufffd"):
        bad -= 1  # a page that was cut inside its only character that is not ASCII
    if bad <= MAX_BAD_UTF8 * count(NON_ASCII, text):
        return text
    for name in chain(declared, map(guess, [raw]), ["cp1252"]):  # guesses only if it must
        if name is None or name.startswith("utf-"):
            continue  # UTF-8 and UTF-16 are known by their bytes
        decoded = raw.decode(name, "replace")
        # C1 controls are the letters of another code page
        if count(NO_TEXT, decoded) <= MAX_BAD * count(NON_ASCII, decoded):
            return decoded
    return text


def count(pattern: re.Pattern[str], text: str) -> int:
    """Number of characters that match a pattern of one character."""
    return len(pattern.findall(text))


def keep_text(text: str) -> str | None:
    """Return the text unless too much of it is control characters and bytes that did not fit."""
    return text if count(NO_TEXT, text) <= max(1, MAX_NO_TEXT * len(text)) else None


def utf16_without_mark(raw: bytes) -> str | None:
    """UTF-16's codec by the position of NULs, whatever is declared; None if it is not UTF-16."""
    even, odd = raw[0::2].count(0), raw[1::2].count(0)
    if max(even, odd) < MIN_UTF16_NULS * (len(raw) // 2) or min(even, odd) > max(even, odd) // 4:
        return None  # some ideographs have a NUL too, in the other place
    return "utf-16-le" if odd > even else "utf-16-be"


def declared_encodings(raw: bytes, content_type: str | None) -> Iterator[str | None]:
    """Codecs that the header and the document declare; None for an unknown label."""
    match = IN_HEADER.search(content_type or "")
    if match is not None:
        yield find_codec(match[1])
    in_document = IN_DOCUMENT.search(COMMENT.sub(b"", raw[:DECLARED_WITHIN]))
    if in_document is not None:
        yield find_codec((in_document[1] or in_document[2]).decode())


def find_codec(label: str) -> str | None:
    """Python's codec for a label as the Encoding standard reads it; None for an unknown label."""
    import webencodings

    encoding = webencodings.lookup(label)
    if encoding is None or encoding.name in ("replacement", "x-user-defined"):
        return None
    name: str = encoding.codec_info.name
    return WIDER.get(name, name)


def guess(raw: bytes) -> str | None:
    """Codec by the statistics of letters; None if there are too few or it is unknown to the web.

    From a few accents statistics find code pages of DOS, where windows-1252 is right.
    """
    import cchardet

    if len(raw.translate(None, bytes(range(128)))) < MIN_STATISTICS and b"\x1b" not in raw:
        return None
    label = cchardet.detect(raw)["encoding"]
    return find_codec(WEB_LABELS.get(label, label)) if label else None
