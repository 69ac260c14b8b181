"""The file formats of a corpus, read row by row: .txt, .jsonl, .json and .csv, also compressed, and .parquet."""

import csv
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from fat5.data.text.rows import LARGEST_DOCUMENT, Chunk, CorpusOptions, CorpusRow, Lines, missing_column, row_text
from fat5.errors import DataError
from fat5.files import PICKLE_HEADS, parse_json

CODECS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00"}
TEXT_FORMS = (".txt", ".jsonl", ".json", ".csv")
EXTENSIONS = (*(form + codec for form in TEXT_FORMS for codec in ("", *CODECS)), ".parquet")
READ = "FAT5 reads .txt, .jsonl, .json and .csv (also .gz, .zst, .bz2, .xz of them) and .parquet"
_MAGIC = {
    **dict.fromkeys(PICKLE_HEADS, "a pickle, which FAT5 never loads"),
    b"PK\x03\x04": "a zip archive (or a torch pickle, which FAT5 never loads)",
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"\xfd7zXZ\x00": "xz data",
    b"PAR1": "Parquet data",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "a PDF",
}
_HEAD = 4096
_PARQUET_ROWS = 16  # decoded at a time: a small file can name one large document in every row
_HOW_LINES_LOOK = 'Each line is {"text": "…"}; `jq -c ".[]" FILE` makes lines of an array'


def extension_of(name: str | Path) -> str | None:
    """The known extension of a file name, or None."""
    lowered = Path(name).name.lower()
    return next((extension for extension in EXTENSIONS if lowered.endswith(extension)), None)


def sniff(path: str, extension: str | None = None) -> None:
    """Raises DataError if a file is empty or binary, or its first bytes belie its extension.

    Args:
        extension: that of the name, `.csv.gz`, if it is none of `EXTENSIONS`.
    """
    extension = extension or extension_of(path)
    if extension is None:
        raise DataError("unknown extension", where=path, hint=READ)
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from error
    if not head:
        raise DataError("this file is empty", where=path, hint="Leave it out")
    expected = b"PAR1" if extension == ".parquet" else CODECS.get(Path(extension).suffix)
    if expected and head.startswith(expected):
        return
    found = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if found is None and b"\x00" in head:
        found = "binary data"
    if found or expected:
        raise DataError(
            f"is not {extension} but {found or 'something else'}", where=path, hint="Give text, or rename the file"
        )


def split(path: str, target: int, options: CorpusOptions) -> Iterator[Chunk]:
    """Parts of a file that can be read independently, of about `target` bytes each; (0, -1) is a file read whole."""
    extension, size = extension_of(path), os.path.getsize(path)
    if extension == ".parquet":
        yield from _row_groups(path, target)
    elif extension in (".jsonl", ".json") or (extension == ".txt" and options.txt_documents != "file"):
        parts = max(1, round(size / target))
        for start, stop in pairwise(size * part // parts for part in range(parts + 1)):
            yield Chunk(path, start, stop, stop - start)
    else:
        yield Chunk(path, 0, -1, size)


def read_rows(chunk: Chunk, options: CorpusOptions, columns: Sequence[str] = ()) -> Iterator[CorpusRow | DataError]:
    """Rows of one part of a file. A row without text has the text "".

    For a row that cannot be read, its error is yielded, with file and line; the rows after it follow.

    Raises:
        DataError: the file is damaged, or has no such column.
    """
    path = chunk.path
    extension = extension_of(path) or ""
    if chunk.start == chunk.stop:
        return
    with naming_damage(path):
        if extension == ".parquet":
            yield from _parquet(chunk, options.text_column, columns)
        elif extension.startswith(".csv"):
            yield from _csv(path, options.text_column, columns)
        elif not extension.startswith(".txt"):
            yield from _jsonl(chunk, options.text_column, columns)
        elif options.txt_documents == "paragraph":
            yield from _paragraphs(chunk)
        elif options.txt_documents == "line":
            yield from _text_lines(chunk)
        else:
            yield _whole_file(path)


@contextmanager
def naming_damage(path: str | Path) -> Iterator[None]:
    """Turns what decompression and the system raise on a file into a DataError that names it."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise DataError("gzip data is damaged", where=path, hint="Fetch it again") from error
    except OSError as error:
        hint = "Fetch it again" if error.errno is None else None  # bz2 and pyarrow have no errno for damage
        raise DataError(f"cannot be read ({error.strerror or error})", where=path, hint=hint) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"compressed data is damaged or cut short ({error})", where=path, hint="Fetch it again"
        ) from error


def _jsonl(chunk: Chunk, text_column: str, columns: Sequence[str]) -> Iterator[CorpusRow | DataError]:
    import orjson

    lines = Lines(chunk.path, chunk.start, chunk.stop)
    # If the column's name stands before a colon twice, an object may have the key twice.
    names = [json.dumps(name, ensure_ascii=False).encode() for name in {text_column, *text_column.split(".")}]
    keys = [(name, re.compile(re.escape(name) + rb"\s*:")) for name in names]
    for line in lines:
        if line.isspace():
            continue
        found: CorpusRow | DataError
        try:
            lines.check(line)
            if any(line.count(name) > 1 and len(key.findall(line)) > 1 for name, key in keys):
                row = _careful_json(lines.text(line), lines)
            else:
                try:
                    row = orjson.loads(lines.text(line) if lines.number == 1 else line)
                except orjson.JSONDecodeError:
                    row = _careful_json(lines.text(line), lines)
            if not isinstance(row, dict):
                raise DataError("not a JSON object", where=lines.where(), hint=_HOW_LINES_LOOK)
            text = row.get(text_column)
            if type(text) is not str:
                text = row_text(row, text_column, lines.where())
            found = CorpusRow(text, lines.position, {name: row[name] for name in columns if name in row})
        except DataError as error:
            found = error
        yield found


def _careful_json(line: str, lines: Lines) -> Any:
    """Parses a line that the fast parser refuses or may misread: `NaN`, or a repeated key."""
    try:
        return parse_json(line, strict=True)
    except ValueError as error:
        raise DataError(f"not JSON ({error})", where=lines.where(), hint=_HOW_LINES_LOOK) from error


def _text_lines(chunk: Chunk) -> Iterator[CorpusRow | DataError]:
    lines = Lines(chunk.path, chunk.start, chunk.stop)
    for line in lines:
        try:
            found: CorpusRow | DataError = CorpusRow(lines.text(line).rstrip("\r\n"), lines.position, {})
        except DataError as error:
            found = error
        yield found


def _paragraphs(chunk: Chunk) -> Iterator[CorpusRow | DataError]:
    # A paragraph belongs to the part with the blank line before it; reading goes past the part to finish it.
    lines = Lines(chunk.path, chunk.start)
    ours = chunk.start == 0
    kept: list[str] = []
    size = 0
    for line in lines:
        past = 0 <= chunk.stop <= lines.begin
        if line.isspace():
            if kept:
                yield CorpusRow("".join(kept).rstrip("\r\n"), lines.position, {})
            if past:
                return
            ours, kept, size = True, [], 0
        elif ours:
            size += len(line)
            try:
                if size > LARGEST_DOCUMENT >= len(line):
                    what = f"a paragraph longer than {LARGEST_DOCUMENT >> 20} MiB"
                    hint = "Is it one document a line? Then add --corpus.txt_documents line"
                    raise DataError(what, where=lines.where(), hint=hint)
                kept.append(lines.text(line))
            except DataError as error:
                yield error
                ours, kept = False, []
        elif past:
            return
    if kept:
        yield CorpusRow("".join(kept).rstrip("\r\n"), lines.position, {})


def _whole_file(path: str) -> CorpusRow | DataError:
    lines = Lines(path)
    kept: list[str] = []
    size = 0
    for line in lines:
        size += len(line)
        if size > LARGEST_DOCUMENT:
            hint = "Use --corpus.txt_documents paragraph"
            return DataError(f"a document longer than {LARGEST_DOCUMENT >> 20} MiB", where=path, hint=hint)
        try:
            kept.append(lines.text(line))
        except DataError as error:
            return error
    return CorpusRow("".join(kept), lines.position, {})


def _csv(path: str, text_column: str, columns: Sequence[str]) -> Iterator[CorpusRow | DataError]:
    rows = csv_rows(path)
    names, _ = next(rows)
    if text_column not in names:
        raise missing_column(text_column, names, f"{path}:1")
    twice = next((name for name in (text_column, *columns) if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"column {twice!r} stands twice", where=f"{path}:1", hint="Rename one")
    for values, position in rows:
        if isinstance(values, DataError):
            yield values
        else:
            row = dict(zip(names, values))
            yield CorpusRow(row[text_column], position, {name: row[name] for name in columns if name in row})


def csv_rows(path: str, delimiter: str = ",") -> Iterator[tuple[Any, int]]:
    """The fields of the header, then those of each row that has any, with the file position after it.

    For a row that cannot be read, its error is yielded; the rows after it follow.

    Raises:
        DataError: the header cannot be read, or quotes are out of order.
    """
    csv.field_size_limit(LARGEST_DOCUMENT)
    lines = CsvLines(path)
    reader = csv.reader(map(lines.text, lines), delimiter=delimiter, strict=True)
    try:
        names = next((names for names in reader if names), [])
        if lines.fault:
            raise lines.fault
        yield names, lines.position
        for values in reader:
            if lines.fault:
                yield lines.fault, lines.position
            elif len(values) == len(names):
                yield values, lines.position
            elif values:
                what = f"fields in this row: {len(values)}, in the header: {len(names)}"
                sign = "tabs" if delimiter == "\t" else "commas"
                yield DataError(what, where=lines.where(), hint=f"Quote fields that hold {sign}"), lines.position
            lines.fault, lines.size = None, 0
    except csv.Error as error:
        hint = "Quote fields that hold quotes or line breaks, and double the quotes in them"
        raise DataError(f"not CSV ({error})", where=lines.where(), hint=hint) from error


class CsvLines(Lines):
    """Lines for the csv module. It needs every line to find the end of a row, so a fault is kept until the row ends."""

    fault: DataError | None = None
    size = 0

    def text(self, line: bytes) -> str:
        self.size += len(line)
        if self.size > LARGEST_DOCUMENT:
            raise DataError(
                f"a row longer than {LARGEST_DOCUMENT >> 20} MiB", where=self.where(), hint="Is a quote open?"
            )
        try:
            return super().text(line)
        except DataError as error:
            self.fault = self.fault or error
            return line.decode("utf-8", "replace")


def _row_groups(path: str, target: int) -> Iterator[Chunk]:
    """Runs of row groups with about `target` bytes each."""
    metadata = open_parquet(path).metadata
    first, filled = 0, 0
    for group in range(metadata.num_row_groups):
        filled += metadata.row_group(group).total_byte_size
        if filled >= target or group + 1 == metadata.num_row_groups:
            yield Chunk(path, first, group + 1, filled)
            first, filled = group + 1, 0


def _parquet(chunk: Chunk, text_column: str, columns: Sequence[str]) -> Iterator[CorpusRow | DataError]:
    import pyarrow

    path = chunk.path
    file = open_parquet(path)
    _check_parquet(file.schema_arrow, text_column, path)
    names = file.schema_arrow.names
    wanted = [text_column, *(name for name in columns if name in names and name != text_column)]
    position = 0
    try:
        for group in range(chunk.start, chunk.stop):
            metadata = file.metadata.row_group(group)
            size, count = metadata.total_byte_size, max(1, metadata.num_rows)
            done = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group], columns=wanted):
                for row in batch.to_pylist():
                    done += 1
                    text = row_text(row, text_column, path)
                    if len(text) > LARGEST_DOCUMENT:
                        where = f"{path}, row {done} of row group {group}"
                        yield DataError(f"a document longer than {LARGEST_DOCUMENT >> 20} MiB", where=where)
                    else:
                        yield CorpusRow(text, position + size * done // count, row)
            position += size
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError("Parquet data is damaged", where=path, hint="Fetch it again") from error


def open_parquet(path: str) -> Any:
    """The `ParquetFile`; DataError if it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("Parquet data is damaged", where=path, hint="Fetch it again") from error


def _check_parquet(schema: Any, column: str, path: str) -> None:
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
