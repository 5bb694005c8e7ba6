"""Reads web pages from the records of WARC archives."""

import io
import re
import zlib
from collections.abc import Iterator
from typing import Any

from warcio.bufferedreaders import ChunkedDataReader
from warcio.statusandheaders import StatusAndHeaders, StatusAndHeadersParser

from data.readers.archives import MAX_BODY_BYTES, Record, read_archive
from data.readers.base import IS_HTML, CountingReader, Page
from data.readers.decode import decode
from data.readers.listing import suffixes_of

# imported at the first record that needs them
PAGE_PACKAGES = ("orjson", "warcio", "brotli", "zstandard", "webencodings", "cchardet")
PAGE_RECORDS = ("response", "resource", "conversion")  # others hold no page, or no new one
HTML_TYPES = ("text/html", "application/xhtml+xml")
# types that say nothing about a page; its bytes decide, as where there is no type
UNKNOWN_TYPES = ("", "application/http", "application/octet-stream", "application/unknown",
                 "application/x-unknown", "unknown/unknown", "content/unknown",
                 "application/force-download", "*/*",
                 "text/plain", "text/xml", "application/xml")  # fmt: skip
# what browsers take for HTML (WHATWG MIME Sniffing, 7.1), also after an XML declaration
HTML_START = re.compile(
    rb"(?:<\?xml[^>]*>|(?><!--.*?-->)|\s)*+<(?:!doctype\s+html|html|head|script|iframe|h1|div|font"
    rb"|table|a|style|title|b|body|br|p)[\s>]",
    re.IGNORECASE | re.DOTALL,
)
SNIFFED_BYTES = 4096
MARKS = b"\xef\xbb\xbf\xff\xfe"  # of UTF-8 and UTF-16
HTTP_HEADERS = StatusAndHeadersParser(["HTTP/"], verify=False)
ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS
GZIP_MAGIC = b"\x1f\x8b"
# registered content codings that nothing here decodes; any other name is ignored, as by browsers,
# since servers send `utf-8` or `none`
OTHER_CODINGS = ("compress", "x-compress", "dcb", "dcz", "exi", "pack200-gzip", "sdch")


class NotADocument(Exception):
    """A record without a page: the reason, and what the quarantine keeps of it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def warc_rows(reader: CountingReader, filepath: str) -> Iterator[tuple[int, Any]]:
    """Yield the pages of one archive; skips records that hold none (requests, metadata)."""
    # the bytes of an archive say how its records are compressed; of a whole file, the suffix
    compression = "infer" if suffixes_of(filepath) in (".warc.bz2", ".warc.xz") else None
    with reader.data_folder.open(filepath, "rb", compression=compression) as file:
        for index, record in enumerate(read_archive(file)):
            where = f"{filepath}:{index}"
            kind = (record.headers.get_header("WARC-Type") or "").lower()
            if kind not in PAGE_RECORDS and not record.damage:
                continue
            try:
                text, metadata = read_page(record, kind)
            except NotADocument as error:
                reader.drop(error.reason, where, error.detail)
                continue
            row = {reader.text_key: text, reader.id_key: record_id(record, where), **metadata}
            yield index, Page(row)


def record_id(record: Record, where: str) -> str:
    """A record's identifier; its place if the archive gives none."""
    return record.headers.get_header("WARC-Record-ID") or where


def read_page(record: Record, kind: str) -> tuple[str, dict[str, Any]]:
    """Text of a record, and its url, date and IS_HTML; raises NotADocument without a page."""
    url = (record.headers.get_header("WARC-Target-URI") or "").strip("<> ")
    if record.damage or not url:
        raise NotADocument("corrupt", f"{url}: {record.damage or 'no WARC-Target-URI'}")
    content_type = record.headers.get_header("Content-Type") or ""
    payload_type = record.headers.get_header("WARC-Identified-Payload-Type") or ""
    stream = io.BytesIO(record.body)
    codings: list[str] = []
    if kind == "response" and record.body.startswith(b"HTTP/"):
        http = HTTP_HEADERS.parse(stream)
        if not is_whole_page(http.statusline):
            raise NotADocument("http_status", f"{url}: {http.statusline}")
        content_type = http.get_header("Content-Type") or ""
        codings = [*tokens(http, "Content-Encoding"), *tokens(http, "Transfer-Encoding")]
    types = [media_type(payload_type), media_type(content_type)]
    is_text = kind == "conversion" and types[-1] in ("", "text/plain")
    known = next((name for name in types if name not in UNKNOWN_TYPES), None)
    if not is_text and known is not None and known not in HTML_TYPES:
        raise NotADocument("not_html", f"{url}: {known}")
    body = decode_body(stream, codings, url)
    if not is_text and not (looks_like_html(body) if known is None else body[:5] != b"%PDF-"):
        raise NotADocument("not_html", url)
    text = decode(body, content_type)
    if text is None:
        raise NotADocument("undecodable", url)
    date = record.headers.get_header("WARC-Date")
    return text, {"url": url, "date": date, IS_HTML: not is_text}


def is_whole_page(status: str) -> bool:
    """Whether an HTTP status promises the page itself: 2xx, but not 206, a part of it."""
    return re.match(r"2\d\d\b", status) is not None and not status.startswith("206")


def media_type(content_type: str) -> str:
    """A media type without parameters, in lower case."""
    return re.split(r"[;,\s]", content_type.strip(), maxsplit=1)[0].lower()


def tokens(http: StatusAndHeaders, name: str) -> Iterator[str]:
    """Lower-case values of all headers of a name, which hold lists."""
    for header, value in http.headers:
        if header.lower() == name.lower():
            yield from (token.strip().lower() for token in value.split(","))


def looks_like_html(body: bytes) -> bool:
    """Whether bytes of unknown type start like HTML, in any encoding that has ASCII."""
    return HTML_START.match(body[:SNIFFED_BYTES].lstrip(MARKS).replace(b"\0", b"")) is not None


def decode_body(stream: io.BytesIO, codings: list[str], url: str) -> bytes:
    """Undo the codings of an HTTP body; raises NotADocument if that is not possible."""
    body = stream.read()
    for coding in reversed(codings):
        if coding in OTHER_CODINGS:
            raise NotADocument(f"encoding_{coding}", url)
        body = decompress(body, coding)
    if max(len(body), stream.getbuffer().nbytes) > MAX_BODY_BYTES:
        raise NotADocument("too_large", url)
    return body


def decompress(body: bytes, coding: str) -> bytes:
    """Undo one coding; the body as it is if it is not so coded, as where a crawler undid it.

    Of a body that was cut, the part that can be read.
    """
    limit = MAX_BODY_BYTES + 1
    if looks_like_html(body):  # short texts can be valid brotli or deflate
        return body
    if coding == "chunked":
        return ChunkedDataReader(io.BytesIO(body)).read()
    if coding in ("gzip", "x-gzip"):
        return inflate(body, ZLIB_OR_GZIP)
    if coding == "deflate":  # with zlib's header, or raw as from old servers
        return inflate(body, ZLIB_OR_GZIP, -zlib.MAX_WBITS)
    if coding == "br":
        import brotli

        try:
            return brotli.Decompressor().process(body, output_buffer_limit=limit)
        except brotli.error:
            return body
    if coding == "zstd":
        import zstandard

        decompressor = zstandard.ZstdDecompressor()
        try:
            return decompressor.stream_reader(body, read_across_frames=True).read(limit)
        except zstandard.ZstdError:
            return body
    return body


def inflate(body: bytes, *window_bits: int) -> bytes:
    """Decompress by the first of zlib's formats that fits, or return the body as it is.

    A gzip body may have several members. What follows the last one is no part of the page.
    """
    for bits in window_bits:
        data, rest = b"", body
        try:
            while rest and len(data) <= MAX_BODY_BYTES:
                member = zlib.decompressobj(bits)
                data += member.decompress(rest, MAX_BODY_BYTES + 1 - len(data))
                rest = member.unused_data if member.unused_data.startswith(GZIP_MAGIC) else b""
            return data
        except zlib.error:
            if data:
                return data
    return body
