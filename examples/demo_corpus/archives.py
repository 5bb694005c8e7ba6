"""WARC files, as a crawler writes them."""

from collections.abc import Iterable
from io import BytesIO
from typing import BinaryIO

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter


def write_archive(stream: BinaryIO, pages: Iterable[tuple[str, str]]) -> None:
    """Write (URL, HTML) pairs as response records.

    Identifiers and dates are fixed, so that equal pages give equal bytes.
    """
    writer = WARCWriter(stream, gzip=True)
    for url, html in pages:
        record = writer.create_warc_record(
            url,
            "response",
            payload=BytesIO(html.encode("utf-8", "replace")),
            http_headers=StatusAndHeaders(
                "200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.0"
            ),
            warc_headers_dict={
                "WARC-Record-ID": f"<urn:page:{url}>",
                "WARC-Date": "2000-01-01T00:00:00Z",
                "WARC-Identified-Payload-Type": "text/html",
            },
        )
        writer.write_record(record)
