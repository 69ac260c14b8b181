"""Rows of a corpus and the lines they come from: bounded in length, with their number for an error."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from fat5.errors import DataError

# A longer line or document is a file without line breaks, not a text, and would fill the memory.
LARGEST_DOCUMENT = 32 << 20
# 4 bytes of Zstandard can hold 128 KiB, so this much compressed data makes 16 MiB at most.
ZSTANDARD_INPUT = 512


@dataclass(frozen=True)
class Chunk:
    """A part of one file: bytes [start, stop) of a text file, row groups of Parquet, or all of a compressed file."""

    path: str
    start: int
    stop: int
    bytes: int


@dataclass
class CorpusOptions:
    """How to read a corpus.

    Args:
        text_column: column (or JSON key) of the text; `translation.fr` is the key `fr` in `translation`.
        on_bad_row: `refuse` stops at a row that cannot be read; `skip` counts it and continues.
        txt_documents: a document in a .txt file is a `paragraph` (between blank lines), a `line`, or the whole `file`.
        subset: configuration of a Hugging Face dataset, such as a language.
        split: split of a Hugging Face dataset.
    """

    text_column: str = "text"
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    txt_documents: Literal["paragraph", "line", "file"] = "paragraph"
    subset: str | None = None
    split: str = "train"


@dataclass(slots=True)
class CorpusRow:
    """One document: its text, the file position after it in raw bytes, and the other columns asked for."""

    text: str
    position: int
    columns: dict[str, Any]


@dataclass
class BadRows:
    """Rows that could not be read and were skipped: their number, and the first one's error."""

    count: int = 0
    first: str = ""

    def add(self, error: DataError) -> None:
        """Counts one row."""
        self.count += 1
        self.first = self.first or str(error)


def row_text(row: Mapping[str, Any], column: str, where: object) -> str:
    """The text of one row, or "" if it is null; DataError if there is no such column, or no string in it.

    The column `translation.fr` is the key `fr` in `translation`.
    """
    text: Any = row
    for name in [column] if column in row or "." not in column else column.split("."):
        if text is None:
            return ""
        if not isinstance(text, Mapping) or name not in text:
            raise missing_column(column, text if isinstance(text, Mapping) else row, where)
        text = text[name]
    if text is None:
        return ""
    if isinstance(text, Mapping):
        nested = ", ".join(f"{column}.{name}" for name in list(text)[:20])
        raise DataError(f"column {column!r} is nested", where=where, hint=f"Name one of {nested or 'its keys'}")
    if not isinstance(text, str):
        raise DataError(f"column {column!r} holds {type(text).__name__}, not text", where=where)
    return text


def missing_column(column: str, columns: Iterable[object], where: object) -> DataError:
    """The error for a wrong text column, which names the existing ones."""
    shown = ", ".join(sorted(map(str, columns))[:20]) or "none"
    return DataError(f"no column {column!r}; it has {shown}", where=where, hint="Name one with --corpus.text_column")


class Lines:
    """Lines of a file, plain or compressed, that start at bytes in [start, stop).

    A line above `LARGEST_DOCUMENT` is cut there and its rest is skipped; `check` and `text` refuse it.
    """

    def __init__(self, path: str, start: int = 0, stop: int = -1) -> None:
        self.path = path
        self.number = 0
        self.begin = self.position = start
        self._start, self._stop = start, stop

    def __iter__(self) -> Iterator[bytes]:
        with open(self.path, "rb") as raw:
            stream, tell = decompressed(raw, self.path.lower())
            offset = self._start
            if offset:
                # A line that began before `start` belongs to the previous part.
                raw.seek(offset - 1)
                offset += _skip_line(raw) - 1
            while self._stop < 0 or offset < self._stop:
                line = stream.readline(LARGEST_DOCUMENT + 1)
                if not line:
                    return
                self.number += 1
                self.begin = offset
                offset += len(line)
                self.position = tell() if tell else offset
                yield line
                if len(line) > LARGEST_DOCUMENT and not line.endswith(b"\n"):
                    offset += _skip_line(stream)

    def where(self) -> str:
        """`path:line` of the last line; the lines before `start` are counted only here."""
        before = 0
        if self._start:
            with open(self.path, "rb") as file:
                left = self._start - 1
                while left > 0 and (block := file.read(min(left, 1 << 20))):
                    before += block.count(b"\n")
                    left -= len(block)
            before += 1
        return f"{self.path}:{before + self.number}"

    def check(self, line: bytes) -> None:
        """Raises DataError if the last line is longer than `LARGEST_DOCUMENT`."""
        if len(line) > LARGEST_DOCUMENT:
            raise DataError(f"a line longer than {LARGEST_DOCUMENT >> 20} MiB", where=self.where(), hint="Break it up")

    def text(self, line: bytes) -> str:
        """The last line as text, without a byte order mark; DataError if it is too long, or not UTF-8."""
        self.check(line)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"invalid UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})",
                where=self.where(),
                hint="Convert it to UTF-8",
            ) from error
        if self.number == 1 and self._start == 0:
            text = text.removeprefix("\ufeff")
        return text


def _skip_line(stream: Any) -> int:
    skipped = 0
    while part := stream.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def decompressed(raw: BinaryIO, name: str) -> tuple[Any, Callable[[], int] | None]:
    """A stream that decompresses no more than is read from it, and a function that gives its position in raw bytes."""
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw), raw.tell
    if name.endswith(".zst"):
        return io.BufferedReader(Zstandard(raw), 1 << 17), raw.tell
    if name.endswith(".bz2"):
        return bz2.BZ2File(raw), raw.tell
    if name.endswith(".xz"):
        return lzma.LZMAFile(raw), raw.tell
    return raw, None


class Zstandard(io.RawIOBase):
    """Decompresses frame by frame. zstandard's own reader takes a truncated file for a complete one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new, self._damage = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(ZSTANDARD_INPUT)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last Zstandard frame is cut short")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._output, self._input = memoryview(self._frame.decompress(self._input)), b""
            except self._damage as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size
