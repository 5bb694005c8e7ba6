"""Reads Parquet: one row per document, with the columns that the recipe reads."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from core.errors import InputError
from data.readers.base import CountingReader, is_damage

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1000
# read for every recipe, besides the text
COLUMNS = ("id", "group", "url", "metadata")


def parquet_rows(reader: CountingReader, filepath: str) -> Iterator[tuple[int, Any]]:
    """Yield (row index, row); of a damaged row group, drops what the footer counts beyond it."""
    import pyarrow.parquet

    with (
        reader.data_folder.open(filepath, "rb") as stream,
        pyarrow.parquet.ParquetFile(stream) as file,
    ):
        columns = choose_columns(reader, file.schema_arrow.names, filepath)
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            error: Exception | str = "fewer rows than the footer says"
            try:
                for batch in file.iter_batches(BATCH_ROWS, [group], columns):
                    yield from batch_rows(reader, batch, filepath, first)
                    first += batch.num_rows
            except Exception as raised:
                if not is_damage(raised):
                    raise
                error = raised
            if first < end:
                where = f"{filepath}:{first}-{end - 1}"
                reader.drop("damaged_rows", where, str(error), end - first)
            first = end


def choose_columns(reader: CountingReader, names: list[str], filepath: str) -> list[str]:
    """Names of the columns to read; raises InputError if none has the recipe's text."""
    text_columns = dict.fromkeys((reader.text_key, *reader.instead_of_text))
    if text_columns.keys().isdisjoint(names):
        raise InputError(
            f"{filepath} has no column {' or '.join(text_columns)}, but {', '.join(names)}: set "
            "data.sources.<name>.text_key"
        )
    if reader.columns is None:
        return names
    wanted = {*text_columns, *COLUMNS, *reader.columns}
    return [name for name in names if name in wanted]


def batch_rows(
    reader: CountingReader, batch: "pyarrow.RecordBatch", filepath: str, first: int
) -> Iterator[tuple[int, Any]]:
    """Yield (row index, row) of a batch; drops single rows that have no value in Python."""
    batch = with_times_as_numbers(batch)
    try:
        rows: list[Any] = batch.to_pylist()
    except Exception:  # of one row, such as a string that is not UTF-8
        rows = [row_or_error(batch.slice(index, 1)) for index in range(batch.num_rows)]
    for index, row in enumerate(rows, first):
        if isinstance(row, Exception):
            reader.drop("corrupt", f"{filepath}:{index}", str(row))
        else:
            yield index, {name: text_of(value) for name, value in row.items()}


def row_or_error(row: "pyarrow.RecordBatch") -> Any:
    """A batch of one row as a dict, or the error that it raises."""
    try:
        return row.to_pylist()[0]
    except Exception as error:
        return error


def text_of(value: Any) -> Any:
    """Text that a writer stored as bytes; other values as they are."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def with_times_as_numbers(batch: "pyarrow.RecordBatch") -> "pyarrow.RecordBatch":
    """Read times at any depth as the file's integers, since Python's calendar ends in 9999."""
    import pyarrow

    schema = pyarrow.schema([field.with_type(plain_type(field.type)) for field in batch.schema])
    return batch if schema.equals(batch.schema) else batch.cast(schema)


def plain_type(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    """The type that a column is read as: integers for times; any other type is kept."""
    import pyarrow
    from pyarrow import types

    if types.is_temporal(kind) and not types.is_interval(kind):
        return pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(plain_type(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(plain_type(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(plain_type(kind.value_type)))
    if types.is_fixed_size_list(kind):
        item = kind.value_field.with_type(plain_type(kind.value_type))
        return pyarrow.list_(item, kind.list_size)
    if types.is_map(kind):
        return pyarrow.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    return kind
