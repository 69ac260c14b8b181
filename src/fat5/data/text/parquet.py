"""Parquet files of a corpus: parts by row group, and the texts of a column of any string type, nested or not."""

from collections.abc import Iterator, Sequence
from typing import Any

from fat5.data.text.lines import LARGEST_DOCUMENT
from fat5.data.text.rows import Row, missing_column, row_text
from fat5.errors import DataError

# Decoded at a time: a small file can name one large document in every row.
BATCH_ROWS = 16


def row_groups(path: str, target: int) -> Iterator[tuple[int, int, int]]:
    """(first, past the last, bytes) of consecutive row groups that hold about `target` bytes together."""
    metadata = _open(path).metadata
    first, filled = 0, 0
    for group in range(metadata.num_row_groups):
        filled += metadata.row_group(group).total_byte_size
        if filled >= target or group + 1 == metadata.num_row_groups:
            yield first, group + 1, filled
            first, filled = group + 1, 0


def parquet_rows(
    path: str, start: int, stop: int, text_column: str, columns: Sequence[str]
) -> Iterator[Row | DataError]:
    """Rows of some row groups; an error in place of a row that cannot be read.

    Raises:
        DataError: damaged, or no column of text by that name.
    """
    import pyarrow

    file = _open(path)
    _check_text(file.schema_arrow, text_column, path)
    names = file.schema_arrow.names
    wanted = [text_column, *(name for name in columns if name in names and name != text_column)]
    position = 0
    try:
        for group in range(start, stop):
            metadata = file.metadata.row_group(group)
            size, count = metadata.total_byte_size, max(1, metadata.num_rows)
            done = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=wanted):
                for row in batch.to_pylist():
                    done += 1
                    text = row_text(row, text_column, path)
                    if len(text) > LARGEST_DOCUMENT:
                        where = f"{path}, row {done} of row group {group}"
                        yield DataError(f"a document longer than {LARGEST_DOCUMENT >> 20} MiB", where=where)
                    else:
                        yield Row(text, position + size * done // count, row)
            position += size
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError("Parquet data is damaged", where=path, hint="Fetch it again") from error


def _open(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("Parquet data is damaged", where=path, hint="Fetch it again") from error


def _check_text(schema: Any, column: str, path: str) -> None:
    from pyarrow import types

    fields = {field.name: field.type for field in schema}
    for name in [column] if column in fields or "." not in column else column.split("."):
        if name not in fields:
            raise missing_column(column, fields, path)
        kind = fields[name]
        fields = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        nested = ", ".join(f"{column}.{name}" for name in list(fields)[:20])
        raise DataError(f"column {column!r} is nested", where=path, hint=f"Name one of {nested}")
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(
            f"column {column!r} holds {kind}, not text", where=path, hint="Name one with --corpus.text_column"
        )
