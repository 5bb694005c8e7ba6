"""Readers: what writers of files do is read, and damage costs only what is damaged."""

import bz2
import gzip
import json
import lzma
import tracemalloc
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from core.errors import InputError
from data.readers.inputs import DocumentReader
from data.readers.normalize import normalize
from data.recipes.forums import ConversationReader
from tests.data.samples import PROSE
from tests.data.test_recipes import make_source, run_recipe

FAR_DATE = 2**61  # milliseconds: in the year 73 million


def read(
    folder: Path, reader_class: type[DocumentReader] = DocumentReader, **options: Any
) -> tuple[dict[str, str], dict[str, int]]:
    """Text by id of every document in a folder, and the number of dropped rows by reason."""
    names = sorted(path.name for path in folder.iterdir())
    reader = reader_class(str(folder), names, quarantine=folder.parent / "quarantine", **options)
    texts = {document.id: document.text for document in reader.run()}
    counts = {name: int(stat.total) for name, stat in reader.stats.stats.items()}
    dropped = {
        name.removeprefix("dropped_"): n
        for name, n in counts.items()
        if name.startswith("dropped_")
    }
    assert counts.get("total", 0) == len(texts) + sum(dropped.values())
    assert counts["input_files"] == len(names)
    return texts, dropped


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\r\r\nd\n", "a\nb\nc\n\nd\n"),
        ("a\x85b\u2028c\u2029d\x0be\x1cf", "a\nb\nc\nd\ne\nf"),
        ("\ufeffa\u200bb\u2060c\ufeff", "abc"),
        ("a\x00b\x07\x1b[1m\x7f\x9f", "ab[1m"),
        ("in\xadvis\xad\nible, in\xad\r\nvisible", "invis-\nible, in-\nvisible"),
        ("\ud83d\ude00 \ud800 \udc00", "\U0001f600 \ufffd \ufffd"),
        ("\ufeff\u200b", ""),
    ],
)
def test_characters_are_normalized(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(normalize(text)) == expected
    assert normalize(PROSE + text) == PROSE + expected


@pytest.mark.parametrize(
    "text",
    [
        "\tif x:\n\t\treturn '\\r\\n'\n\x0c\nclass A:\n",  # pages of a source file
        "\\frac{a}{b} ~ $\\alpha$ % x\n",
        "\u0915\u094d\u200d\u0937 \u0645\u06cc\u200c\u062e",  # joiners of Devanagari and Persian
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1e9\U0001f1ea",
        "\u05d0\u200f(\u05d1) \u2066x\u2069",  # marks of direction
        "e\u0301 \u00e9 \u2126 \u212b \ufb01 x\u00b2 \U0001d465 \uf900",  # any Unicode form
        "a\xa0b\u2009c\u3000d\u2026",
        "",
    ],
)
def test_text_code_and_formulas_are_kept(text: str) -> None:
    assert normalize(text) == text


def test_line_ends_make_no_difference_to_a_document(tmp_path: Path, raw: Path) -> None:
    text = "\n".join([PROSE, "", "\tindented", PROSE])
    ends = {"lf": "\n", "crlf": "\r\n", "cr": "\r"}
    rows = [{"id": name, "text": text.replace("\n", end)} for name, end in ends.items()]
    (raw / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), raw / "b.parquet")
    for name, end in ends.items():
        (raw / f"{name}.txt").write_bytes(text.replace("\n", end).encode())
    cleaned, _ = run_recipe(make_source("curated", raw), tmp_path / "clean")
    assert [row["text"] for row in cleaned] == [text] * 9


JSON_LINES = {
    "bom": b'\xef\xbb\xbf{"id": "bom", "text": "first"}',
    "bom2": b'\xef\xbb\xbf{"id": "bom2", "text": "of a second file that was appended"}',
    "nan": b'{"id": "nan", "text": "x", "score": NaN, "scores": [Infinity, -Infinity, 1e999]}',
    "lone": rb'{"id": "lone", "text": "x\ud800 \ud83d\ude00"}',
    "java": b'{"id": "java", "text": "\xed\xa0\xbd\xed\xb8\x80"}',
    "raw": b'{"id": "raw", "text": "a\tb\x01"}',
    "crlf": b'{"id": "crlf", "text": "x"}\r',
    "12345678901234567890123": b'{"id": 12345678901234567890123, "text": "x"}',
    "12345678901234567890124": b'{"id": 12345678901234567890124, "text": "x"}',
    "twice": b'{"id": "once", "id": "twice", "text": "x"}',
    "id\ufffd": rb'{"id": "id\udc00", "text": "x", "media": ["x"], "metadata": null}',
}
NO_JSON = (
    b'{"text": "cut',
    b"nonsense",
    b'{"text": "\xff"}',
    b"[" * 100_000,
    b'{"n": ' + b"9" * 5000,
)


def test_json_is_read_as_its_writers_write_it(raw: Path) -> None:
    blank = [b"", b"  ", b"\r"]
    lines = [line for pair in zip(JSON_LINES.values(), blank * 4, strict=False) for line in pair]
    (raw / "a.jsonl").write_bytes(b"\n".join([*lines, *NO_JSON]) + b"\n\n")
    texts, dropped = read(raw)
    assert texts.keys() == JSON_LINES.keys() and dropped == {"corrupt": len(NO_JSON)}
    assert texts["lone"] == "x\ufffd \U0001f600" and texts["java"] == "\U0001f600"
    assert texts["raw"] == "a\tb" and texts["bom"] == "first"


def test_a_row_without_text_is_quarantined_whatever_it_holds(raw: Path) -> None:
    """Lone surrogates and large integers are no JSON to a strict writer."""
    rows = [rb'{"text": "", "a": "\ud800"}', b'{"a": 12345678901234567890123}', b'{"text": NaN}']
    (raw / "a.jsonl").write_bytes(b"\n".join(rows))
    assert read(raw) == ({}, {"empty": 3})
    (quarantine,) = (raw.parent / "quarantine").iterdir()
    assert [json.loads(line)["raw"] for line in quarantine.open()][1] == {
        "a": 12345678901234567890123
    }


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_marked_encodings_are_read(raw: Path, encoding: str, name: str) -> None:
    """PowerShell writes UTF-16."""
    text = "\u010c\u0142 \U0001f600\n\u010a end"  # with bytes that are line ends in UTF-8
    rows = [{"id": str(i), "text": text} for i in range(3)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (raw / name).write_bytes((text if name == "a.txt" else lines).encode(encoding))
    texts, dropped = read(raw)
    assert list(texts.values()) == [text] * (1 if name == "a.txt" else 3) and not dropped


@pytest.mark.parametrize("suffix", [".json", ".JSON.gz"])
@pytest.mark.parametrize("form", ["lines", "array", "indented array", "indented objects"])
def test_json_files_hold_lines_arrays_or_objects(raw: Path, form: str, suffix: str) -> None:
    rows = [
        {"id": str(i), "text": f'{i}: [{{}}], \\" {PROSE}', "n": [{"a": 1}]} for i in range(9000)
    ]
    content = {
        "lines": "\n".join(map(json.dumps, rows)),
        "array": json.dumps(rows),
        "indented array": json.dumps(rows, indent=1),
        "indented objects": "\n".join(json.dumps(row, indent=1) for row in rows),
    }[form].encode()
    (raw / f"a{suffix}").write_bytes(gzip.compress(content) if "gz" in suffix else content)
    texts, dropped = read(raw)
    assert list(texts.values()) == [row["text"] for row in rows] and not dropped
    (raw / f"a{suffix}").unlink()
    (raw / "a.json").write_bytes(content[: len(content) * 2 // 3])
    texts, dropped = read(raw)
    assert 5900 < len(texts) < 6100
    assert dropped == {"corrupt" if form == "lines" else "damaged_file": 1}


def test_a_large_array_is_not_held_in_memory(raw: Path) -> None:
    row = json.dumps({"text": 40 * PROSE})
    (raw / "a.json").write_text("[" + ",\n".join([row] * 3000) + "]")
    reader = DocumentReader(str(raw), ["a.json"])
    tracemalloc.start()
    assert sum(1 for _ in reader.run()) == 3000
    assert tracemalloc.get_traced_memory()[1] < (raw / "a.json").stat().st_size / 5
    tracemalloc.stop()


PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_are_read_to_their_end(raw: Path, suffix: str) -> None:
    """Also those of several frames, as parallel compressors and `cat` write them."""
    lines = [json.dumps({"id": str(i), "text": f"{i} {hash(str(i))}"}) for i in range(4000)]
    halves = ["\n".join(half).encode() + b"\n" for half in (lines[:2000], lines[2000:])]
    packed = b"".join(map(PACK[suffix], halves))
    (raw / f"a.NDJSON{suffix.upper()}").write_bytes(packed)
    assert len(read(raw)[0]) == 4000 and not read(raw)[1]
    (raw / f"a.NDJSON{suffix.upper()}").write_bytes(packed[:-3])
    texts, dropped = read(raw)
    assert dropped == {"damaged_file": 1} and 2000 <= len(texts) <= 4000


def test_a_file_of_zstd_with_a_long_window_is_read(raw: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    with (raw / "a.jsonl.zst").open("wb") as file:
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        with compressor.stream_writer(file) as writer:  # without the size, as from a pipe
            writer.write(orjson.dumps({"id": "a", "text": PROSE}))
    assert read(raw) == ({"a": PROSE}, {})


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    parquet.write_table(pyarrow.table(columns), path, use_dictionary=False, **options)


def damage_group(path: Path, group: int, column: int) -> None:
    """Overwrite the first page of a column chunk."""
    start = parquet.ParquetFile(path).metadata.row_group(group).column(column).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)


def far_dates(count: int) -> pyarrow.Array:
    return pyarrow.array([FAR_DATE] * count, pyarrow.int64()).cast(pyarrow.timestamp("ms", "UTC"))


def test_unused_columns_of_parquet_cost_nothing(raw: Path) -> None:
    texts = [f"{i} {PROSE}" for i in range(30)]
    columns = {"text": texts, "when": far_dates(30), "other": [f"{i} x" * 9 for i in range(30)]}
    write_parquet(raw / "a.parquet", columns, row_group_size=10)
    damage_group(raw / "a.parquet", 1, 2)
    assert list(read(raw)[0].values()) == texts
    # read with all columns, the dates are no obstacle, and the damaged group costs its rows
    kept, dropped = read(raw, columns=None)
    assert list(kept.values()) == texts[:10] + texts[20:] and dropped == {"damaged_rows": 10}


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
)
def test_text_of_any_arrow_type_is_read(raw: Path, kind: pyarrow.DataType) -> None:
    texts = [PROSE, "h\u00f4tel", "x"]
    value_type = pyarrow.binary() if "binary" in str(kind) else pyarrow.string()
    values = [text.encode() for text in texts] if "binary" in str(kind) else texts
    column = pyarrow.array(values, value_type).cast(kind)
    parquet.write_table(pyarrow.table({"text": column, "id": column}), raw / "a.parquet")
    assert read(raw) == ({text: text for text in texts}, {})


def test_a_string_that_is_not_utf8_costs_its_row(raw: Path) -> None:
    values = [f"{i}".encode() for i in range(3000)]
    values[1500] = b"\xff\xfe"
    offsets = pyarrow.array(values, pyarrow.binary()).buffers()
    text = pyarrow.StringArray.from_buffers(len(values), offsets[1], offsets[2])
    parquet.write_table(pyarrow.table({"text": text}), raw / "a.parquet")
    texts, dropped = read(raw)
    assert len(texts) == 2999 and dropped == {"corrupt": 1}
    (quarantine,) = (raw.parent / "quarantine").iterdir()
    assert json.loads(quarantine.read_text())["where"] == "a.parquet:1500"


def messages(thread: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{thread}-{i}", "parent": None if i == 0 else f"{thread}-0", "text": f"{i} {PROSE}",
         "created": datetime(2030 - i, 1, 1), "picture": b"\xff\xd8"}
        for i in range(3)
    ]  # fmt: skip


def test_damage_and_nested_times_in_parquet_of_conversations(raw: Path) -> None:
    """Replies come in order of time: the third message is earlier than the second."""
    columns = {
        "id": [str(i) for i in range(30)],
        "messages": [messages(i) for i in range(30)],
        "when": far_dates(30),
    }
    write_parquet(raw / "a.parquet", columns, row_group_size=10)
    texts, dropped = read(raw, ConversationReader, columns=None, instead_of_text=("messages",))
    assert texts.keys() == {str(i) for i in range(30)} and not dropped
    assert [line[0] for line in texts["7"].split("\n\n")] == ["0", "2", "1"]
    damage_group(raw / "a.parquet", 1, 3)
    texts, dropped = read(raw, ConversationReader, columns=None, instead_of_text=("messages",))
    assert texts.keys() == {str(i) for i in (*range(10), *range(20, 30))}
    assert dropped == {"damaged_rows": 10}


def test_recipes_name_the_columns_of_their_text(tmp_path: Path, raw: Path) -> None:
    turns = [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "Oder."},
    ]
    write_parquet(raw / "a.parquet", {"messages": [turns] * 3, "when": far_dates(3)})
    rows, _ = run_recipe(make_source("instructions", raw), tmp_path / "instructions")
    assert [row["text"] for row in rows] == ["User: Name a river.\n\nAssistant: Oder.\n"] * 3
    with pytest.raises(
        InputError, match="has no column text, but messages, when: set data.sources"
    ):
        run_recipe(make_source("curated", raw), tmp_path / "curated")
    write_parquet(raw / "a.parquet", {"body": ["x"]})
    with pytest.raises(
        InputError, match="has no column text or messages or thread or link_id or .*, but body"
    ):
        run_recipe(make_source("forums", raw), tmp_path / "forums")


def test_licences_are_read_from_parquet(tmp_path: Path, raw: Path) -> None:
    code = "def area(width, height):\n    return width * height  # of a rectangle\n" * 4
    columns = {"content": [code] * 2, "max_stars_repo_licenses": [["MIT"], ["GPL-3.0"]],
               "max_stars_repo_name": ["ann/area", "bob/area"], "when": far_dates(2)}  # fmt: skip
    write_parquet(raw / "a.parquet", columns)
    source = replace(make_source("source_code", raw), licence="permissive", text_key="content")
    rows, steps = run_recipe(source, tmp_path / "clean")
    assert [row["group"] for row in rows] == ["ann/area"]
    assert steps[1].dropped == {"licence_not_permissive": 1}


def test_streams_hand_on_what_comes_before_damage(raw: Path) -> None:
    packed = gzip.compress(b"".join(b"%d\n" % i for i in range(100_000)))
    (raw / "a.txt.gz").write_bytes(packed[: len(packed) // 2])
    with DocumentReader(str(raw), ["a.txt.gz"]).open_file("a.txt.gz") as stream:
        assert all(next(stream) == b"%d\n" % i for i in range(10_000))
        with pytest.raises(EOFError):
            stream.read()
    assert read(raw) == ({}, {"damaged_file": 1})
