"""Bytes of any encoding become the text that their author wrote, or None."""

import os
import time

import pytest

from data.readers.decode import decode

START = "<html><head>{}<title>Harbour</title></head><body><p>The ships come at dawn. "
END = " The keeper counts them.</p></body></html>"
FRENCH = "Le café naïf du port, où l’été était déjà passé."
RUSSIAN = "Это тихая гавань, и корабли приходят на рассвете."
JAPANESE = "静かな港です。船は夜明けに来ます。カフェもあります。"
KOREAN = "조용한 항구이며 배는 새벽에 온다. 똠방각하"
CHINESE = "这是一个安静的港口，船只在黎明时到达。"
UTF_8 = "text/html; charset=utf-8"


def page(text: str, head: str = "") -> str:
    return START.format(head) + text + END


def meta(label: str) -> str:
    return f'<meta charset="{label}">'


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("utf-8", "utf-8", RUSSIAN),
        ("UTF8", "utf-8", JAPANESE),
        ("iso-8859-1", "cp1252", FRENCH),
        ("iso-8859-15", "iso8859-15", "Le café coûte 3 €."),
        ("Windows-1251", "cp1251", RUSSIAN),
        ("koi8-r", "koi8-r", "мир"),
        ("x-sjis", "cp932", "①静か"),
        ("Shift_JIS", "cp932", JAPANESE),
        ("EUC-JP", "euc-jp", "港"),
        ("iso-2022-jp", "iso2022_jp", JAPANESE),
        ("EUC-KR", "cp949", KOREAN),
        ("gb2312", "gb18030", "朱镕基 €"),
        ("Big5", "big5hkscs", "港口"),
        ("windows-1250", "cp1250", "zażółć"),
    ],
)
def test_a_declared_charset_is_read_as_browsers_read_it(label: str, codec: str, text: str) -> None:
    """Even of so few letters that statistics cannot know it."""
    raw = page(text).encode(codec)
    assert decode(raw, f"text/html; charset={label}") == page(text)
    assert decode(raw, f'Text/HTML; Charset="{label};"') == page(text)
    for head in (
        meta(label),
        f"<META content='text/html; charset={label}' http-equiv=content-type>",
        f'<!-- <meta charset="ascii"> --><meta charset = {label} />',
    ):
        assert decode(page(text, head).encode(codec)) == page(text, head)
        # the header comes before the document
        other = page(text, meta("koi8-u"))
        assert decode(other.encode(codec), f"text/html; charset={label}") == other
    xml = f'<?xml version="1.0" encoding="{label}"?>\n' + page(text)
    assert decode(xml.encode(codec)) == xml


@pytest.mark.parametrize("declared", [None, "text/html; charset=windows-1252", "a/b; charset=nil"])
@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_is_known_by_its_bytes(codec: str, declared: str | None) -> None:
    for text in (FRENCH, CHINESE * 20, "ASCII"):
        assert decode(page(text).encode(codec), declared) == page(text)


@pytest.mark.parametrize(
    ("codec", "text"),
    [("cp1251", RUSSIAN), ("koi8-r", RUSSIAN), ("cp932", JAPANESE), ("euc-jp", JAPANESE),
     ("iso2022_jp", JAPANESE), ("cp949", KOREAN), ("gb18030", CHINESE), ("cp1252", FRENCH),
     ("cp1252", "It’s"), ("cp1252", "© 2004"), ("cp1252", "a café")],
)  # fmt: skip
@pytest.mark.parametrize("label", ["utf-8", "utf-16", "nonsense", ""])
def test_statistics_decide_where_the_declaration_is_wrong(
    codec: str, text: str, label: str
) -> None:
    whole = page(text, meta(label) if label else "")
    assert decode(whole.encode(codec), f"text/html; charset={label}") == whole


@pytest.mark.parametrize("declared", [UTF_8, "text/html; charset=iso-8859-1", None])
def test_valid_utf8_is_believed_against_its_declaration(declared: str | None) -> None:
    assert decode(page(FRENCH, meta("gb2312")).encode(), declared) == page(FRENCH, meta("gb2312"))


def test_bad_bytes_of_a_utf8_page_cost_only_themselves() -> None:
    raw = page(FRENCH).encode()
    cut = raw[: raw.index("passé".encode()) + 5]
    assert decode(cut, UTF_8) == cut[:-1].decode() + "\ufffd"
    only = b"<p>caf" + "é".encode()[:1]
    assert decode(only, UTF_8) == "<p>caf\ufffd"
    for stray in (b"\xe9", b"\xff", b"\x92", b"\xc3"):
        broken = raw.replace(b"ships", b"sh" + stray + b"ips")
        assert decode(broken, UTF_8) == page(FRENCH).replace("ships", "sh\ufffdips")
        assert decode(broken) == page(FRENCH).replace("ships", "sh\ufffdips")


def test_an_undefined_byte_of_a_page_costs_only_itself() -> None:
    """0x81 has no letter in windows-1252."""
    raw = page(FRENCH + "X").encode("cp1252").replace(b"X", b"\x81")
    assert decode(raw, "text/html; charset=latin1") == page(FRENCH + "\ufffd")
    raw = page("X").encode().replace(b"X", b"\x81")
    assert decode(raw, "text/html; charset=latin1") == page("\ufffd")


def test_windows_1252_in_a_page_with_the_mark_of_utf8() -> None:
    assert decode(b"\xef\xbb\xbf" + page(FRENCH).encode("cp1252"), UTF_8) == page(FRENCH)


@pytest.mark.parametrize("declared", [UTF_8, "text/html; charset=iso-8859-1", None])
def test_binary_is_no_text(declared: str | None) -> None:
    for size in (500, 5_000, 100_000):
        assert decode(os.urandom(size), declared) is None
    assert decode(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, declared) is None
    assert decode(bytes(1000), declared) is None
    assert decode(b"", declared) == ""


def test_utf8_costs_one_pass() -> None:
    """No statistics, no second decoding of a page that is UTF-8."""
    raw = page(RUSSIAN).encode() * 20_000

    def seconds(call: object) -> float:
        start = time.process_time()
        assert callable(call) and call()
        return time.process_time() - start

    plain = min(seconds(raw.decode) for _ in range(5))
    assert min(seconds(lambda: decode(raw, UTF_8)) for _ in range(5)) < 3 * plain
