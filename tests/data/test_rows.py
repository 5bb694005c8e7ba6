"""Rows of JSON Lines and Parquet as their writers lay them out."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from tests.data.samples import PROSE
from tests.data.test_readers import FAR_DATE, raw, read, write_parquet

__all__ = ["raw"]  # a fixture


def test_a_line_may_hold_several_rows(raw: Path) -> None:
    row = {"text": PROSE}
    one = json.dumps(row)
    lines = [
        one + one,  # the last line of a file that had no end, then the next file
        json.dumps([row, row]),
        "[",
        one + ",",
        one,
        "]",
        "\x1e" + one,  # RFC 7464
        "\ufeff" + one + "\r" + one,
        one + "{",
        "[]",
        json.dumps(["text"]),
    ]
    (raw / "a.jsonl").write_bytes("\n".join(lines).encode())
    texts, dropped = read(raw)
    numbers = (0, 1, 2, 3, 5, 6, 8, 9, 10)
    assert texts == {f"a.jsonl/{number}": PROSE for number in numbers}
    assert dropped == {"corrupt": 3}


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.timestamp("ms"),
        pyarrow.list_(pyarrow.timestamp("ms")),
        pyarrow.list_(pyarrow.timestamp("ms"), 1),
        pyarrow.large_list(pyarrow.timestamp("ms")),
        pyarrow.map_(pyarrow.string(), pyarrow.timestamp("ms")),
        pyarrow.struct({"a": pyarrow.list_(pyarrow.timestamp("ms"), 1)}),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.timestamp("ms")),
    ],
)
def test_a_time_beyond_pythons_calendar_costs_nothing(raw: Path, kind: pyarrow.DataType) -> None:
    value: Any = FAR_DATE
    if isinstance(kind, pyarrow.DictionaryType):
        metadata = pyarrow.array([value], kind.value_type).dictionary_encode()
    else:
        name = str(kind)
        value = [("a", value)] if name.startswith("map") else [value] if "list" in name else value
        metadata = pyarrow.array([{"a": value} if name.startswith("struct") else value], kind)
    write_parquet(raw / "a.parquet", {"text": [PROSE], "metadata": metadata})
    assert read(raw) == ({"a.parquet/0": PROSE}, {})
