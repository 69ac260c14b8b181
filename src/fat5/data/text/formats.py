"""The file forms of a corpus (.txt, .jsonl, .json, .csv, also compressed; .parquet), read row by row and strictly."""

import csv
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from fat5.data.text.lines import LARGEST_DOCUMENT, Lines
from fat5.data.text.parquet import parquet_rows, row_groups
from fat5.data.text.rows import Row, missing_column, row_text
from fat5.errors import DataError
from fat5.files import PICKLE_HEADS, parse_json

TxtDocuments = Literal["paragraph", "line", "file"]
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
_HOW_LINES_LOOK = 'Each line is {"text": "…"}; `jq -c ".[]" FILE` makes lines of an array'


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


def split_points(path: str, target: int, txt_documents: TxtDocuments) -> Iterator[tuple[int, int, int]]:
    """Parts of a file that can be read alone: (start, stop, bytes) of about `target` bytes each.

    Starts and stops are bytes for .txt, .jsonl and .json, row groups for .parquet, and (0, -1) for a form read whole.
    """
    extension, size = extension_of(path), os.path.getsize(path)
    if extension == ".parquet":
        yield from row_groups(path, target)
    elif extension in (".jsonl", ".json") or (extension == ".txt" and txt_documents != "file"):
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
) -> Iterator[Row | DataError]:
    """Rows of one part of a file, as `split_points` gave it; rows without text are yielded with text "".

    A row that cannot be read is yielded as its error, with file and line; the rows after it follow.

    Raises:
        DataError: the file as a whole cannot be read: damaged, or without the column.
    """
    import zstandard

    extension = extension_of(path) or ""
    if start == stop:
        return
    try:
        if extension == ".parquet":
            yield from parquet_rows(path, start, stop, text_column, columns)
        elif extension.startswith(".csv"):
            yield from _csv(path, text_column, columns)
        elif extension.startswith(".txt"):
            yield from _txt(path, start, stop, txt_documents)
        else:
            yield from _jsonl(path, start, stop, text_column, columns)
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise DataError("gzip data is damaged", where=path, hint="Fetch it again") from error
        raise DataError(f"cannot be read ({error.strerror or error})", where=path) from error
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(
            f"compressed data is damaged or cut short ({error})", where=path, hint="Fetch it again"
        ) from error


def _jsonl(path: str, start: int, stop: int, text_column: str, columns: Sequence[str]) -> Iterator[Row | DataError]:
    import orjson

    lines = Lines(path, start, stop)
    # Where the name of the column stands before a colon twice, one object may have it twice.
    names = [json.dumps(name, ensure_ascii=False).encode() for name in {text_column, *text_column.split(".")}]
    keys = [(name, re.compile(re.escape(name) + rb"\s*:")) for name in names]
    for line in lines:
        if line.isspace():
            continue
        found: Row | DataError
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
            found = Row(text, lines.position, {name: row[name] for name in columns if name in row})
        except DataError as error:
            found = error
        yield found


def _careful_json(line: str, lines: Lines) -> Any:
    """A line that the fast parser refuses, or may read wrongly: one with `NaN`, or with a key that stands twice."""
    try:
        return parse_json(line, strict=True)
    except ValueError as error:
        raise DataError(f"not JSON ({error})", where=lines.where(), hint=_HOW_LINES_LOOK) from error


def _txt(path: str, start: int, stop: int, documents: TxtDocuments) -> Iterator[Row | DataError]:
    if documents == "file":
        yield _whole_file(path)
    elif documents == "line":
        lines = Lines(path, start, stop)
        for line in lines:
            try:
                found: Row | DataError = Row(lines.text(line).rstrip("\r\n"), lines.position, {})
            except DataError as error:
                found = error
            yield found
    else:
        yield from _paragraphs(path, start, stop)


def _paragraphs(path: str, start: int, stop: int) -> Iterator[Row | DataError]:
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
            try:
                kept.append(_line_of_paragraph(line, lines, size))
            except DataError as error:
                yield error
                ours, kept = False, []
        elif past:
            return
    if kept:
        yield Row("".join(kept).rstrip("\r\n"), lines.position, {})


def _line_of_paragraph(line: bytes, lines: Lines, size: int) -> str:
    if size > LARGEST_DOCUMENT >= len(line):
        raise DataError(
            f"a paragraph longer than {LARGEST_DOCUMENT >> 20} MiB",
            where=lines.where(),
            hint="Is it one document a line? Then add --corpus.txt_documents line",
        )
    return lines.text(line)


def _whole_file(path: str) -> Row | DataError:
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
    return Row("".join(kept), lines.position, {})


def _csv(path: str, text_column: str, columns: Sequence[str]) -> Iterator[Row | DataError]:
    csv.field_size_limit(LARGEST_DOCUMENT)
    lines = _CsvLines(path)
    reader = csv.reader(map(lines.text, lines), strict=True)
    try:
        names = next(reader, [])
        if lines.fault:
            raise lines.fault
        if text_column not in names:
            raise missing_column(text_column, names, f"{path}:1")
        twice = next((name for name in (text_column, *columns) if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"column {twice!r} stands twice", where=f"{path}:1", hint="Rename one")
        for values in reader:
            if lines.fault:
                yield lines.fault
            elif len(values) == len(names):
                row = dict(zip(names, values))
                yield Row(row[text_column], lines.position, {name: row[name] for name in columns if name in row})
            elif values:
                what = f"fields in this row: {len(values)}, in the header: {len(names)}"
                yield DataError(what, where=lines.where(), hint="Quote fields that hold commas")
            lines.fault, lines.size = None, 0
    except csv.Error as error:
        raise DataError(f"not CSV ({error})", where=lines.where(), hint="Quote fields that hold line breaks") from error


class _CsvLines(Lines):
    """Lines for the csv module, which needs every line to know where rows end. Counts and judges those of one row."""

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
