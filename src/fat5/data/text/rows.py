"""One row of a corpus: its text, found by the name of a column, and what is said of a row that cannot be read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fat5.errors import DataError


@dataclass(slots=True)
class Row:
    """One document: its text, how many raw bytes of the file lie behind it, and the further columns asked for."""

    text: str
    position: int
    columns: dict[str, Any]


@dataclass
class BadRows:
    """Rows that were skipped because they cannot be read: how many, and what was wrong with the first."""

    count: int = 0
    first: str = ""

    def add(self, error: DataError) -> None:
        """Counts one row."""
        self.count += 1
        self.first = self.first or str(error)


def row_text(row: Mapping[str, Any], column: str, where: object) -> str:
    """The text of one row, "" where it is null. The column `translation.fr` is the key `fr` in `translation`.

    Raises:
        DataError: no such column, or no string in it.
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
    """The error of a wrong text column, with the columns there are."""
    shown = ", ".join(sorted(map(str, columns))[:20]) or "none"
    return DataError(f"no column {column!r}; it has {shown}", where=where, hint="Name one with --corpus.text_column")
