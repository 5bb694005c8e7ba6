"""Reads JSON Lines: one document per line."""

from collections.abc import Iterator
from typing import Any

import orjson
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.readers import JsonlReader

from data.readers.base import CountingReader


class Jsonl(CountingReader, JsonlReader):
    """One JSON object per line; drops only the lines that do not parse."""

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Yield the documents of one file, decompressed by its suffix."""
        for index, row in self.rows(filepath):
            document = self.get_document_from_dict(row, filepath, index)
            if document is not None:
                yield document

    def rows(self, filepath: str) -> Iterator[tuple[int, Any]]:
        """Yield (line index, value) for every line that parses."""
        with self.data_folder.open(filepath, "rb", compression="infer") as lines:
            for index, line in enumerate(lines):
                try:
                    yield index, orjson.loads(line)
                except orjson.JSONDecodeError:
                    self.drop("corrupt", f"{filepath}:{index}", line)
