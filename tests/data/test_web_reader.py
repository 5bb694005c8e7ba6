"""Which records of an archive are pages, and what damage to an archive costs."""

import gzip
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import brotli
import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data.pipeline.tasks import document_row
from data.readers import archives, web
from data.readers.inputs import DocumentReader
from data.recipes.extraction import MainTextExtractor

PAGE = "<!DOCTYPE html>\n<html><body><p>The harbour café is quiet.</p></body></html>"
XHTML = f'<?xml version="1.0" encoding="utf-8"?>\n<!-- - -->\n{PAGE}'
RAW = PAGE.encode()
Headers = list[tuple[str, str]]
HTML: Headers = [("Content-Type", "text/html")]


def archive(
    body: bytes = RAW,
    headers: Headers = HTML,
    status: str = "200 OK",
    kind: str = "response",
    warc: dict[str, str] | None = None,
    compressed: bool = False,
    uri: str = "http://harbour.invalid/",
) -> bytes:
    """An archive of one record, as warcio writes it."""
    stream = io.BytesIO()
    writer = WARCWriter(stream, gzip=compressed)
    http = StatusAndHeaders(status, headers, protocol="HTTP/1.1") if kind == "response" else None
    record = writer.create_warc_record(
        uri, kind, payload=io.BytesIO(body), http_headers=http, warc_headers_dict=warc
    )
    writer.write_record(record)
    return stream.getvalue()


def read(folder: Path, raw: bytes, name: str = "a.warc") -> tuple[list[str], dict[str, int]]:
    """Texts of an archive's pages, and the counts of what was dropped."""
    (folder / name).write_bytes(raw)
    reader = DocumentReader(str(folder), [name])
    texts = [document.text for document in reader.run()]
    counts = {key: stat.total for key, stat in reader.stats.stats.items()}
    dropped = {
        key.removeprefix("dropped_"): n for key, n in counts.items() if key.startswith("dropped_")
    }
    assert counts.get("total", 0) == len(texts) + sum(dropped.values())
    return texts, dropped


def numbered(count: int = 5) -> list[bytes]:
    """Archives of one record each."""
    return [archive(f"<html>{n} {zlib.crc32(bytes([n])):x}</html>".encode()) for n in range(count)]


@pytest.mark.parametrize(
    ("identified", "http", "body"),
    [
        ("text/html", "text/html", PAGE),
        ("text/html; charset=utf-8", "text/plain", PAGE),
        ("Text/HTML", None, PAGE),
        (None, "TEXT/HTML;charset=utf-8", PAGE),
        (None, "text/html, text/html", PAGE),
        (None, "application/xhtml+xml", XHTML),
        (None, "application/xml", XHTML),
        ("application/octet-stream", "text/html", PAGE),
        (None, "application/octet-stream", PAGE),
        (None, "text/plain", "\ufeff \n<!-- a > b --> <HTML lang=en>" + PAGE),
        (None, None, PAGE),
        (None, "text/html", "A page without markup."),
    ],
)
def test_html_is_recognised(
    tmp_path: Path, identified: str | None, http: str | None, body: str
) -> None:
    warc = {"WARC-Identified-Payload-Type": identified} if identified else None
    headers = [("Content-Type", http)] if http else []
    texts, dropped = read(tmp_path, archive(body.encode(), headers, warc=warc))
    assert texts == [body.removeprefix("\ufeff")] and not dropped


@pytest.mark.parametrize(
    ("identified", "http", "body", "reason"),
    [
        ("application/pdf", "text/html", RAW, "not_html"),
        (None, "text/html", b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>", "not_html"),
        (None, "application/json", b"{}", "not_html"),
        (None, "image/svg+xml", b"<svg></svg>", "not_html"),
        (None, "application/rss+xml", b"<?xml version='1.0'?><rss></rss>", "not_html"),
        (None, "text/xml", b"<?xml version='1.0'?><rss></rss>", "not_html"),
        (None, None, b"plain text", "not_html"),
        (None, "text/html", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "undecodable"),
        (None, "text/html", b"", "empty"),
    ],
)
def test_what_is_no_page_is_counted(
    tmp_path: Path, identified: str | None, http: str | None, body: bytes, reason: str
) -> None:
    warc = {"WARC-Identified-Payload-Type": identified} if identified else None
    headers = [("Content-Type", http)] if http else []
    assert read(tmp_path, archive(body, headers, warc=warc)) == ([], {reason: 1})


@pytest.mark.parametrize(
    ("status", "reason"),
    [("200 OK", None), ("200", None), ("203 Non-Authoritative Information", None),
     ("206 Partial Content", "http_status"), ("301 Moved", "http_status"),
     ("403 Forbidden", "http_status"), ("404 Not Found", "http_status"),
     ("503 Busy", "http_status"), ("OK", "http_status"), ("2000 OK", "http_status")],
)  # fmt: skip
def test_only_whole_answers_are_pages(tmp_path: Path, status: str, reason: str | None) -> None:
    texts, dropped = read(tmp_path, archive(status=status))
    assert (texts, dropped) == (([], {reason: 1}) if reason else ([PAGE], {}))
    assert read(tmp_path, archive(b"", status="204 No Content")) == ([], {"empty": 1})


def raw_deflate(body: bytes) -> bytes:
    return zlib.compress(body)[2:-4]


def chunked(body: bytes) -> bytes:
    return b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:])


@pytest.mark.parametrize(
    ("headers", "encode"),
    [
        ("Content-Encoding: br", brotli.compress),
        ("Content-Encoding: gzip", gzip.compress),
        ("content-encoding: X-GZIP", gzip.compress),
        ("Content-Encoding: zstd", zstandard.compress),
        ("Content-Encoding: deflate", zlib.compress),
        ("Content-Encoding: deflate", raw_deflate),
        ("Content-Encoding: gzip, br", lambda body: brotli.compress(gzip.compress(body))),
        ("Content-Encoding: gzip\nContent-Encoding: br",
         lambda body: brotli.compress(gzip.compress(body))),
        ("Transfer-Encoding: Chunked", chunked),
        ("Content-Encoding: br\nTransfer-Encoding: chunked",
         lambda body: chunked(brotli.compress(body))),
        ("Transfer-Encoding: gzip, chunked", lambda body: chunked(gzip.compress(body))),
        ("Content-Encoding: gzip",
         lambda body: gzip.compress(body[:30]) + gzip.compress(body[30:])),
        ("Content-Encoding: gzip", lambda body: gzip.compress(body) + b"\0" * 8),
        ("Content-Encoding: zstd",
         lambda body: zstandard.compress(body[:30]) + zstandard.compress(body[30:])),
        # a crawler decoded the body and kept the headers
        ("Content-Encoding: br", bytes),
        ("Content-Encoding: gzip\nTransfer-Encoding: chunked", bytes),
        ("Content-Encoding: deflate", bytes),
        ("Content-Encoding: zstd", bytes),
        ("Content-Encoding: identity", bytes),
        ("Content-Encoding: utf-8", bytes),
    ],
)  # fmt: skip
def test_content_codings_are_undone(
    tmp_path: Path, headers: str, encode: Callable[[bytes], bytes]
) -> None:
    pairs = [(line.split(": ")[0], line.split(": ")[1]) for line in headers.splitlines()]
    assert read(tmp_path, archive(encode(RAW), [*HTML, *pairs])) == ([PAGE], {})


def test_a_page_that_was_cut_in_its_compressed_form_keeps_its_start(tmp_path: Path) -> None:
    body = PAGE + "".join(f"<p>{zlib.crc32(bytes([n])):x}</p>" for n in range(250))
    raw = gzip.compress(body.encode())
    headers = [*HTML, ("Content-Encoding", "gzip")]
    (text,), dropped = read(tmp_path, archive(raw[: len(raw) // 2], headers))
    assert body.startswith(text) and len(text) > len(PAGE) and not dropped


@pytest.mark.parametrize("coding", ["compress", "dcb"])
def test_an_unknown_coding_is_counted_by_name(tmp_path: Path, coding: str) -> None:
    raw = archive(b"\x1f\x9d\x90", [*HTML, ("Content-Encoding", coding)])
    assert read(tmp_path, raw) == ([], {f"encoding_{coding}": 1})


@pytest.mark.parametrize("coding", ["br", "gzip", "zstd", "deflate"])
def test_a_decompression_bomb_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coding: str
) -> None:
    encode = {"br": brotli.compress, "gzip": gzip.compress, "zstd": zstandard.compress,
              "deflate": zlib.compress}  # fmt: skip
    monkeypatch.setattr(web, "MAX_BODY_BYTES", 100_000)
    raw = encode[coding](b"<html>" + b"a" * 10_000_000)
    reply = archive(raw, [*HTML, ("Content-Encoding", coding)])
    assert read(tmp_path, reply) == ([], {"too_large": 1})


def test_an_oversized_record_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (web, archives):
        monkeypatch.setattr(module, "MAX_BODY_BYTES", 1000)
    raw = archive(b"<html>" + b"a" * 200_000) + archive()
    assert read(tmp_path, raw) == ([PAGE], {"too_large": 1})


@pytest.mark.parametrize("charset", ["windows-1251", "koi8-r", "utf-16"])
def test_the_charset_of_the_answer_is_used(tmp_path: Path, charset: str) -> None:
    text = "<html><p>мир</p></html>"
    headers = [("content-type", f'text/html; Charset="{charset}"')]
    assert read(tmp_path, archive(text.encode(charset), headers)) == ([text], {})


def test_records_without_http_headers(tmp_path: Path) -> None:
    """Resources of wget and Browsertrix are pages by their type; extracted text stays as it is."""
    text = "The harbour <b>is</b> quiet.\n\nShips come."
    raw = archive(kind="resource", warc={"Content-Type": "text/html"})
    raw += archive(b"log of wget", kind="resource", warc={"Content-Type": "text/plain"})
    raw += archive(text.encode(), kind="conversion", warc={"Content-Type": "text/plain"})
    raw += archive(kind="conversion", warc={"Content-Type": "image/png"})
    raw += archive(kind="resource", warc={"Content-Type": "application/http; msgtype=response"})
    for kind in ("metadata", "request", "revisit", "warcinfo"):
        other = archive(kind="metadata", warc={"Content-Type": "text/html"})
        raw += other.replace(b"WARC-Type: metadata", f"WARC-Type: {kind}".encode())
    assert read(tmp_path, raw) == ([PAGE, text, PAGE], {"not_html": 2})
    reader = DocumentReader(str(tmp_path), ["a.warc"])
    assert [document.text for document in MainTextExtractor().run(reader.run())][1:-1] == [text]


def test_wgets_brackets_and_missing_headers(tmp_path: Path) -> None:
    raw = archive(uri="http://harbour.invalid/a")
    raw = raw.replace(b"http://harbour.invalid/a", b"<http://harbour.invalid/a>")
    bare = re.sub(rb"WARC-(Record-ID|Date): [^\r]*\r\n", b"", archive())
    (tmp_path / "a.warc").write_bytes(raw + bare)
    reader = DocumentReader(str(tmp_path), ["a.warc"])
    rows = [document_row(reader, document) for document in reader.run()]
    assert [row["url"] for row in rows] == ["http://harbour.invalid/a", "http://harbour.invalid/"]
    assert rows[0]["id"].startswith("<urn:uuid:") and rows[1]["id"] == "a.warc:1"
    no_uri = re.sub(rb"WARC-Target-URI: [^\r]*\r\n", b"", archive())
    assert read(tmp_path, no_uri) == ([], {"corrupt": 1})


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
def test_an_archive_is_known_by_its_bytes(tmp_path: Path, name: str) -> None:
    plain = b"".join(numbered())
    texts, _ = read(tmp_path, plain)
    assert len(texts) == 5
    for raw in (
        plain,
        b"".join(map(gzip.compress, numbered())),
        gzip.compress(plain),
        zstandard.compress(plain),
        b"".join(map(zstandard.compress, numbered())),
    ):
        assert read(tmp_path, raw, name) == (texts, {})


def test_zstd_with_a_dictionary(tmp_path: Path) -> None:
    samples = [record[start:] for record in numbered(200) for start in (0, 50)]
    dictionary = zstandard.train_dictionary(2000, samples)
    compressor = zstandard.ZstdCompressor(dict_data=dictionary)
    frames = b"".join(map(compressor.compress, numbered()))
    for stored in (dictionary.as_bytes(), zstandard.compress(dictionary.as_bytes())):
        head = archives.ZSTD_DICTIONARY + len(stored).to_bytes(4, "little") + stored
        texts, dropped = read(tmp_path, head + frames)
        assert len(texts) == 5 and not dropped


def flip(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at:][1:]


@pytest.mark.parametrize("at", [0, 2, 30, -100, -6, -1])
@pytest.mark.parametrize("which", [0, 2, 4])
def test_a_damaged_gzip_member_costs_one_record(tmp_path: Path, at: int, which: int) -> None:
    members = [gzip.compress(record) for record in numbered()]
    members[which] = flip(members[which], at % len(members[which]))
    texts, dropped = read(tmp_path, b"".join(members))
    assert len(texts) == 4 and sum(dropped.values()) == 1
    assert not any(text.startswith(f"<html>{which} ") for text in texts)


@pytest.mark.parametrize("length", ["-1", "x", "", "5", "2000000"])
def test_a_wrong_content_length_costs_one_gzip_record(tmp_path: Path, length: str) -> None:
    records = numbered()
    records[2] = re.sub(
        rb"(type: \w+/http[^\r]*\r\nContent-Length: )\d+", rb"\g<1>" + length.encode(),
        records[2], flags=re.IGNORECASE,
    )  # fmt: skip
    assert records[2] != numbered()[2]
    texts, dropped = read(tmp_path, b"".join(map(gzip.compress, records)))
    assert len(texts) == 4 and dropped == {"corrupt": 1}
    texts, dropped = read(tmp_path, b"".join(records))
    lost = 3 if length == "2000000" else 1  # a length beyond the file hides what follows
    assert len(texts) == 5 - lost and sum(dropped.values()) == 1


def test_bytes_between_records_are_counted(tmp_path: Path) -> None:
    records = numbered()
    for raw in (
        b"junk\r\n" + b"".join(records),
        b"\r\njunk\r\n\r\n".join([records[0], b"".join(records[1:])]),
    ):
        texts, dropped = read(tmp_path, raw)
        assert len(texts) == 5 and dropped == {"corrupt": 1}
    padded = b"".join(map(gzip.compress, records)) + bytes(512)
    assert len(read(tmp_path, padded)[0]) == 5 and not read(tmp_path, padded)[1]
    for raw in (b"no archive", b"", gzip.compress(b"no archive")):
        texts, dropped = read(tmp_path, raw)
        assert not texts and sum(dropped.values()) == 1


def test_html_files_are_decoded_by_their_meta_element(tmp_path: Path) -> None:
    text = '<html><meta charset="windows-1251"><p>мир</p></html>'
    (tmp_path / "a.html").write_bytes(text.encode("cp1251"))
    (tmp_path / "b.html").write_bytes(bytes(range(256)) * 9)
    reader = DocumentReader(str(tmp_path), ["a.html", "b.html"])
    assert [document.text for document in reader.run()] == [text]
    assert reader.stats.stats["dropped_undecodable"].total == 1
