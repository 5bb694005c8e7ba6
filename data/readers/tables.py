"""Reads Parquet: one document per row."""

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.readers import ParquetReader

from core.errors import InputError
from data.readers.base import CountingReader, is_damage


class Parquet(CountingReader, ParquetReader):
    """One row per document; drops the rows of a damaged row group, which the footer counts."""

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Yield the documents of one file."""
        import pyarrow.parquet

        with (
            self.data_folder.open(filepath, "rb") as stream,
            pyarrow.parquet.ParquetFile(stream) as file,
        ):
            if self.text_key not in file.schema_arrow.names:
                raise InputError(
                    f"{filepath} has no column {self.text_key}, but "
                    f"{', '.join(file.schema_arrow.names)}: set data.sources.<name>.text_key"
                )
            first = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                try:
                    table = file.read_row_group(group)
                except Exception as error:
                    if not is_damage(error):
                        raise
                    where = f"{filepath}:{first}-{first + num_rows - 1}"
                    self.drop("damaged_rows", where, str(error), num_rows)
                    first += num_rows
                    continue
                for batch in table.to_batches(self.batch_size):
                    for index, row in enumerate(batch.to_pylist(), first):
                        document = self.get_document_from_dict(row, filepath, index)
                        if document is not None:
                            yield document
                    first += batch.num_rows
