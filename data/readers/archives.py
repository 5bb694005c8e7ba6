"""Reads the records of a WARC file: plain, gzip or zstd, whatever its name.

warcio's iterator takes the end of a truncated gzip stream for the end of the archive, and one wrong
Content-Length or damaged gzip member costs the rest of the file. Here it costs one record.
"""

import io
import re
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

from warcio.limitreader import LimitReader
from warcio.statusandheaders import StatusAndHeaders, StatusAndHeadersParser

from data.readers.base import TruncatedArchiveError

CHUNK_BYTES = 1 << 16
MAX_BODY_BYTES = 1 << 26  # of a record, and of a page after decompression; a larger one is dropped
GZIP_MEMBER = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")
ZSTD_FRAME = b"\x28\xb5\x2f\xfd"
ZSTD_DICTIONARY = b"\x5d\x2a\x4d\x18"  # the frame before the records (IIPC's WARC/zstd)
MAX_HEADER_BYTES = 1 << 20
RECORD_START = b"WARC/"
RECORD_END = b"\r\n\r\n"
HEADERS = StatusAndHeadersParser([RECORD_START.decode()], verify=False)


@dataclass(frozen=True)
class Record:
    """A record's headers and body; `damage` says why it is none."""

    headers: StatusAndHeaders
    body: bytes = b""  # at most MAX_BODY_BYTES + 1
    damage: str = ""


def read_archive(file: Any) -> Iterator[Record]:
    """Yield all records, each damaged part of the file as one record with `damage`.

    Raises TruncatedArchiveError or EOFError at the end of a file that ends inside a record.
    """
    start = file.read(CHUNK_BYTES)
    file.seek(0)
    zstd = start.startswith((ZSTD_FRAME, ZSTD_DICTIONARY))
    gzip = GZIP_MEMBER.match(start) if RECORD_START in start else GZIP_MEMBER.search(start)
    if gzip is not None and not zstd:  # searched, as the first member may be damaged
        yield from read_members(file)
        return
    stream = open_zstd(file) if zstd else io.BufferedReader(file, CHUNK_BYTES)
    tail = yield from read_records(stream)
    if tail != RECORD_END:
        raise TruncatedArchiveError("the last record has no end")


def read_members(file: Any) -> Iterator[Record]:
    """Yield the records of gzip members, of which each holds one record, or one holds all."""
    source = GzipSource(file)
    damaged = False
    while source.find_member():
        if source.skipped and not damaged:
            yield Record(no_headers(), damage="bytes between gzip members")
        damaged = False
        try:
            yield from read_records(io.BufferedReader(GzipMember(source), CHUNK_BYTES))
        except (zlib.error, TruncatedArchiveError) as error:
            damaged = True
            yield Record(no_headers(), damage=f"damaged gzip member or record: {error}")
    if source.skipped and not damaged:
        raise TruncatedArchiveError("bytes after the last gzip member")


def open_zstd(file: Any) -> io.BufferedReader:
    """Open a zstd stream of frames, with the dictionary that its first frame may hold."""
    import zstandard

    dictionary = b""
    if file.read(4) == ZSTD_DICTIONARY:
        dictionary = file.read(int.from_bytes(file.read(4), "little"))
        if dictionary.startswith(ZSTD_FRAME):
            dictionary = zstandard.ZstdDecompressor().decompress(dictionary, MAX_BODY_BYTES)
    else:
        file.seek(0)
    loaded = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    decompressor = zstandard.ZstdDecompressor(dict_data=loaded)
    return io.BufferedReader(decompressor.stream_reader(file, read_across_frames=True), CHUNK_BYTES)


class GzipSource:
    """Compressed bytes, from which members are decompressed one after another."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.pending = b""
        self.skipped = False  # whether there was more than padding before the member

    def find_member(self) -> bool:
        """Skip to the next gzip header; False at the end of the file."""
        self.skipped = False
        while True:
            match = GZIP_MEMBER.search(self.pending)
            # a header may lie across the border of two chunks
            end = match.start() if match else max(len(self.pending) - 3, 0)
            self.skipped |= any(self.pending[:end])
            self.pending = self.pending[end:]
            if match is not None:
                return True
            more = self.file.read(CHUNK_BYTES)
            if not more:
                self.skipped |= any(self.pending)
                return False
            self.pending += more


class GzipMember(io.RawIOBase):
    """The decompressed bytes of one gzip member."""

    def __init__(self, source: GzipSource) -> None:
        self.source = source
        self.decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def readable(self) -> bool:
        """Return True, as io.BufferedReader asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; 0 at the member's end, EOFError at the end of the file before it."""
        source = self.source
        while not self.decompressor.eof:
            compressed = source.pending or source.file.read(CHUNK_BYTES)
            if not compressed:
                raise EOFError("the last gzip member has no end")
            source.pending = compressed[1:]  # where the search goes on, should this raise
            data = self.decompressor.decompress(compressed, len(buffer))
            source.pending = self.decompressor.unconsumed_tail or self.decompressor.unused_data
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0


def no_headers() -> StatusAndHeaders:
    """Headers of bytes that are no record."""
    return StatusAndHeaders("", [])


def read_records(stream: io.BufferedReader) -> Generator[Record, None, bytes]:
    """Yield the records of a stream; returns the line breaks after the last one.

    After damage, reading goes on at the next line that starts a record. Raises
    TruncatedArchiveError if there is none.
    """
    line, blank = next_line(stream)
    while line:
        record = Record(no_headers(), damage="bytes between records")
        if line.startswith(RECORD_START):
            record = read_record(stream, line)
            line, blank = next_line(stream)
            if line and not line.startswith(RECORD_START) and blank != RECORD_END:
                record = replace(record, damage="its Content-Length is wrong")
        if record.damage and not line.startswith(RECORD_START):
            line = skip_to_record(stream)
            if not line:
                raise TruncatedArchiveError(record.damage)
        yield record
    return blank


def read_record(stream: io.BufferedReader, line: bytes) -> Record:
    """Read a record after its first line."""
    headers = HEADERS.parse(LimitReader(stream, MAX_HEADER_BYTES), line)
    length = headers.get_header("Content-Length") or ""
    if length.isascii() and length.isdigit():
        return Record(headers, read_body(stream, int(length)))
    return Record(headers, damage=f"its Content-Length is {length!r}")


def next_line(stream: io.BufferedReader) -> tuple[bytes, bytes]:
    """Return the next line that is not blank, empty at the end, and the line breaks before it."""
    blank = b""
    while line := stream.readline(CHUNK_BYTES):
        if line.strip():
            return line, blank
        blank = (blank + line)[-len(RECORD_END) :]
    return b"", blank


def skip_to_record(stream: io.BufferedReader) -> bytes:
    """Skip to the line that starts the next record and return it; empty at the end."""
    while line := stream.readline(CHUNK_BYTES):
        if line.startswith(RECORD_START):
            break
    return line


def read_body(stream: io.BufferedReader, length: int) -> bytes:
    """Read `length` bytes and return the first MAX_BODY_BYTES + 1 of them.

    Raises TruncatedArchiveError if there are fewer.
    """
    body = stream.read(min(length, MAX_BODY_BYTES + 1))
    rest = length - len(body)
    while rest and (skipped := stream.read(min(rest, CHUNK_BYTES))):
        rest -= len(skipped)
    if rest:
        raise TruncatedArchiveError(f"a record ends {rest} bytes before its Content-Length")
    return body
