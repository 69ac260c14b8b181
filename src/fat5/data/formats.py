"""The file forms of a corpus (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .csv), read row by row and strictly."""

import csv
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from fat5.data.lines import LARGEST_DOCUMENT, Lines
from fat5.errors import DataError

TxtDocuments = Literal["paragraph", "line", "file"]
EXTENSIONS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".csv")
_MAGIC = {
    b"\x80\x02": "a pickle, which FAT5 never loads",
    b"\x80\x03": "a pickle, which FAT5 never loads",
    b"\x80\x04": "a pickle, which FAT5 never loads",
    b"\x80\x05": "a pickle, which FAT5 never loads",
    b"PK\x03\x04": "a zip archive (or a torch pickle, which FAT5 never loads)",
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PAR1": "Parquet data",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "a PDF",
}
_EXPECTED = {".jsonl.gz": b"\x1f\x8b", ".jsonl.zst": b"\x28\xb5\x2f\xfd", ".parquet": b"PAR1"}
_HEAD = 4096


@dataclass(slots=True)
class Row:
    """One document: its text, how many raw bytes of the file lie behind it, and the further columns asked for."""

    text: str
    position: int
    columns: dict[str, Any]


def extension_of(name: str) -> str | None:
    """The extension FAT5 reads a file by, or None."""
    lowered = Path(name).name.lower()
    return next((extension for extension in EXTENSIONS if lowered.endswith(extension)), None)


def sniff(path: str) -> None:
    """Looks at the first bytes of a file.

    Raises:
        DataError: unknown extension, empty, binary, or not the form its name says.
    """
    extension = extension_of(path)
    if extension is None:
        raise DataError("unknown extension", where=path, hint=f"FAT5 reads {', '.join(EXTENSIONS)}")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from error
    if not head:
        raise DataError("this file is empty", where=path, hint="Leave it out")
    expected = _EXPECTED.get(extension)
    if expected and head.startswith(expected):
        return
    found = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if found is None and b"\x00" in head:
        found = "binary data"
    if found or expected:
        raise DataError(
            f"is not {extension} but {found or 'something else'}", where=path, hint="Give text, or rename the file"
        )


def split_points(path: str, target: int, txt_documents: TxtDocuments) -> Iterator[tuple[int, int, int]]:
    """Parts of a file that can be read alone: (start, stop, bytes) of about `target` bytes each.

    Starts and stops are bytes for .txt and .jsonl, row groups for .parquet, and (0, -1) for a form read whole.
    """
    extension, size = extension_of(path), os.path.getsize(path)
    if extension == ".parquet":
        yield from _row_groups(path, target)
    elif extension == ".jsonl" or (extension == ".txt" and txt_documents != "file"):
        parts = max(1, round(size / target))
        points = [size * part // parts for part in range(parts + 1)]
        for start, stop in pairwise(points):
            yield start, stop, stop - start
    else:
        yield 0, -1, size


def read_rows(
    path: str,
    start: int,
    stop: int,
    text_column: str = "text",
    txt_documents: TxtDocuments = "paragraph",
    columns: Sequence[str] = (),
) -> Iterator[Row]:
    """Rows of one part of a file, as `split_points` gave it; rows without text are yielded with text "".

    Raises:
        DataError: damaged, too long, not UTF-8, or without the column; with file and line.
    """
    extension = extension_of(path)
    if start == stop:
        return
    try:
        if extension == ".parquet":
            yield from _parquet(path, start, stop, text_column, columns)
        elif extension == ".csv":
            yield from _csv(path, text_column, columns)
        elif extension == ".txt":
            yield from _txt(path, start, stop, txt_documents)
        else:
            yield from _jsonl(path, start, stop, text_column, columns)
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise DataError("gzip data is damaged", where=path, hint="Fetch it again") from error
        raise DataError(f"cannot be read ({error.strerror or error})", where=path) from error
    except (EOFError, zlib.error) as error:
        raise DataError("compressed data is damaged or cut short", where=path, hint="Fetch it again") from error


def row_text(row: dict[str, Any], column: str, where: object) -> str:
    """The text of one row, "" where it is null.

    Raises:
        DataError: no such column, or no string in it.
    """
    if column not in row:
        raise missing_column(column, list(row), where)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"column {column!r} holds {type(text).__name__}, not text", where=where)
    return text


def missing_column(column: str, columns: Sequence[str], where: object) -> DataError:
    """The error of a wrong text column, with the columns there are."""
    shown = ", ".join(sorted(map(str, columns))[:20]) or "none"
    return DataError(f"no column {column!r}; it has {shown}", where=where, hint="Name one with --corpus.text_column")


def _jsonl(path: str, start: int, stop: int, text_column: str, columns: Sequence[str]) -> Iterator[Row]:
    import orjson
    import zstandard

    lines = Lines(path, start, stop)
    try:
        for line in lines:
            if line.isspace():
                continue
            try:
                row = orjson.loads(lines.text(line) if lines.number == 1 else line)
            except orjson.JSONDecodeError as error:
                lines.text(line)
                raise DataError(f"not JSON ({error})", where=lines.where(), hint="Each line is one object") from error
            if not isinstance(row, dict):
                raise DataError("not a JSON object", where=lines.where(), hint='Each line is {"text": "…"}')
            if text_column in row and type(row[text_column]) is str:
                text = row[text_column]
            else:
                text = row_text(row, text_column, lines.where())
            yield Row(text, lines.position, {name: row[name] for name in columns if name in row})
    except zstandard.ZstdError as error:
        raise DataError("Zstandard data is damaged", where=path, hint="Fetch it again") from error


def _txt(path: str, start: int, stop: int, documents: TxtDocuments) -> Iterator[Row]:
    if documents == "file":
        yield from _whole_file(path)
        return
    if documents == "line":
        lines = Lines(path, start, stop)
        for line in lines:
            yield Row(lines.text(line).rstrip("\r\n"), lines.position, {})
        return
    # A paragraph belongs to the part that holds the blank line before it; reading goes past `stop` to finish it.
    lines = Lines(path, start, -1)
    ours = start == 0
    kept: list[str] = []
    size = 0
    for line in lines:
        past = 0 <= stop <= lines.begin
        if line.isspace():
            if kept:
                yield Row("".join(kept).rstrip("\r\n"), lines.position, {})
            if past:
                return
            ours, kept, size = True, [], 0
        elif ours:
            size += len(line)
            if size > LARGEST_DOCUMENT:
                raise DataError(
                    f"a paragraph longer than {LARGEST_DOCUMENT >> 20} MiB",
                    where=lines.where(),
                    hint="Is it one document a line? Then add --corpus.txt_documents line",
                )
            kept.append(lines.text(line))
        elif past:
            return
    if kept:
        yield Row("".join(kept).rstrip("\r\n"), lines.position, {})


def _whole_file(path: str) -> Iterator[Row]:
    size = os.path.getsize(path)
    if size > LARGEST_DOCUMENT:
        raise DataError(
            f"a document longer than {LARGEST_DOCUMENT >> 20} MiB",
            where=path,
            hint="Use --corpus.txt_documents paragraph",
        )
    lines = Lines(path)
    yield Row("".join(lines.text(line) for line in lines), size, {})


def _csv(path: str, text_column: str, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_DOCUMENT)
    lines = Lines(path)
    reader = csv.DictReader((lines.text(line) for line in lines), strict=True)
    try:
        if text_column not in (reader.fieldnames or []):
            raise missing_column(text_column, reader.fieldnames or [], f"{path}:1")
        for row in reader:
            if row.get(text_column) is None:
                raise DataError(f"a row without column {text_column!r}", where=lines.where(), hint="Quote the fields")
            yield Row(row[text_column], lines.position, {name: row[name] for name in columns if name in row})
    except csv.Error as error:
        raise DataError(f"not CSV ({error})", where=lines.where(), hint="Quote fields that hold line breaks") from error


def _row_groups(path: str, target: int) -> Iterator[tuple[int, int, int]]:
    metadata = _open_parquet(path).metadata
    first, filled = 0, 0
    for group in range(metadata.num_row_groups):
        filled += metadata.row_group(group).total_byte_size
        if filled >= target or group + 1 == metadata.num_row_groups:
            yield first, group + 1, filled
            first, filled = group + 1, 0


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("Parquet data is damaged", where=path, hint="Fetch it again") from error


def _parquet(path: str, start: int, stop: int, text_column: str, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow

    file = _open_parquet(path)
    names = file.schema_arrow.names
    if text_column not in names:
        raise missing_column(text_column, names, path)
    kind = file.schema_arrow.field(text_column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(
            f"column {text_column!r} holds {kind}, not text", where=path, hint="Name one with --corpus.text_column"
        )
    wanted = [text_column, *(name for name in columns if name in names and name != text_column)]
    position = 0
    try:
        for group in range(start, stop):
            size, count = (
                file.metadata.row_group(group).total_byte_size,
                max(1, file.metadata.row_group(group).num_rows),
            )
            done = 0
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=wanted):
                for row in batch.to_pylist():
                    done += 1
                    text = row_text(row, text_column, path)
                    if len(text) > LARGEST_DOCUMENT:
                        raise DataError(f"a document longer than {LARGEST_DOCUMENT >> 20} MiB", where=path)
                    yield Row(text, position + size * done // count, row)
            position += size
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError("Parquet data is damaged", where=path, hint="Fetch it again") from error
