"""Streams of bytes that lose none: up to damage, and in all frames of a compressed file."""

import io
from typing import Any

BUFFER_BYTES = 2**18
COMPRESSED_BYTES = 2**14  # decompressed at once
MAX_WINDOW_BYTES = 2**31  # of zstd's option --long, as in the dumps of Reddit


class AvailableBytes(io.RawIOBase):
    """Hands on the bytes that a stream has, so that damage costs only what follows it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.read_chunk = getattr(stream, "read1", stream.read)
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        """Whether the stream can be read, which io.BufferedReader asks; always True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to len(buffer) bytes; returns their number, 0 at the end."""
        data = self.rest or memoryview(self.read_chunk(len(buffer)))
        count = min(len(data), len(buffer))
        buffer[:count] = data[:count]
        self.rest = data[count:]
        return count

    def close(self) -> None:
        """Close the stream too."""
        self.stream.close()
        super().close()


class ZstdFrames:
    """Decompresses all frames of a file, where fsspec stops after the first."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.frame: Any = None  # decompressor of the current frame
        self.unused = b""  # begins the next frame

    def read(self, size: int) -> bytes:
        """Read some bytes, not `size`; raises EOFError if the last frame has no end."""
        import zstandard

        while data := self.unused or self.stream.read(COMPRESSED_BYTES):
            if self.frame is None:
                decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
                self.frame = decompressor.decompressobj()
            text: bytes = self.frame.decompress(data)
            self.unused = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
            if text:
                return text
        if self.frame is not None:
            raise EOFError("the last frame has no end")
        return b""

    def close(self) -> None:
        """Close the compressed file."""
        self.stream.close()


def open_stream(stream: Any) -> io.BufferedReader:
    """Buffer a stream that has `read` or `read1`."""
    return io.BufferedReader(AvailableBytes(stream), BUFFER_BYTES)
