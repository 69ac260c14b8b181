"""Tables of examples: columns, and the split held out for validation."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import xxhash

from fat5.errors import ConfigurationError, DataError
from fat5.tasks.finetune.reading import find_sources, source_rows

MOST_PARTS = 100
"""Files whose scores are told apart; a batch numbers them in int8."""


class Table:
    """Rows of examples, and where each came from.

    Attributes:
        rows: mappings, column → value.
        files: names of the files or datasets. file: index into them for each row. number: the row's place, from 1.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.file: list[int] = []
        self.number: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """`file, row N`."""
        return f"{self.files[self.file[index]]}, row {self.number[index]}"

    @property
    def parts(self) -> list[int]:
        """Index of each row into `part_names`."""
        return [min(index, MOST_PARTS - 1) for index in self.file]

    @property
    def part_names(self) -> list[str]:
        """The files, of which those above `MOST_PARTS` share a name."""
        if len(self.files) <= MOST_PARTS:
            return self.files
        return [*self.files[: MOST_PARTS - 1], f"{len(self.files) - MOST_PARTS + 1:,} other files"]

    def column(self, name: str) -> list[Any]:
        """A column's values; `translation.fr` is the key `fr` in `translation`. A null stays None.

        Raises:
            DataError: a row has no such column; names the close ones.
        """
        return [self.value(index, name) for index in range(len(self))]

    def value(self, index: int, name: str) -> Any:
        """One value of a column."""
        value: Any = self.rows[index]
        for key in [name] if name in value or "." not in name else name.split("."):
            if value is None:
                return None
            if not isinstance(value, dict) or key not in value:
                raise missing_column(name, self.rows[index], self.where(index))
            value = value[key]
        return value

    def odd(self, index: int, name: str, hint: str) -> DataError:
        """The error for a value that a column may not have."""
        return DataError(f"column {name!r} holds {self.value(index, name)!r:.60}", where=self.where(index), hint=hint)

    def texts(self, name: str, required: bool = True) -> list[str]:
        """A column of texts.

        Raises:
            DataError: a value that is no text, or, if `required`, an empty one.
        """
        values = self.column(name)
        for index, value in enumerate(values):
            if isinstance(value, dict):
                nested = ", ".join(f"{name}.{key}" for key in list(value)[:20]) or "its keys"
                raise DataError(f"column {name!r} is nested", where=self.where(index), hint=f"Name one of {nested}")
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"column {name!r} holds {value!r:.60}, no text", where=self.where(index), hint="Write a text"
                )
            if required and not (value or "").strip():
                raise DataError(f"column {name!r} is empty", where=self.where(index), hint="Remove the row")
        return [value or "" for value in values]

    def select(self, indices: Sequence[int]) -> "Table":
        """The table of some rows."""
        table = Table()
        table.files = self.files
        for name in ("rows", "file", "number"):
            values = getattr(self, name)
            setattr(table, name, [values[index] for index in indices])
        return table

    def sha256(self) -> str:
        """A hash of every value, of which a checkpoint keeps a note."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace"))
            digest.update(b"\n")
        return digest.hexdigest()


def read_table(inputs: Sequence[str], split: str, subset: str | None = None, limit: int | None = None) -> Table:
    """Reads files, folders of files, a dataset of the hub (`hf:NAME`, its split `split`), or the sample corpus:
    `sample:fr` has the columns id, chapter and text, `sample:fr-en` id, chapter, fr and en, translations of each other.

    Args:
        limit: read at most this many rows.

    Raises:
        DataError: as `find_sources` and `source_rows`, or no row at all.
    """
    table = Table()
    for source in (source for name in inputs for source in find_sources(name)):
        if limit is not None and len(table) >= limit:
            break
        table.files.append(source)
        for number, row in source_rows(source, split, subset):
            table.rows.append(row)
            table.file.append(len(table.files) - 1)
            table.number.append(number)
            if len(table) == limit:
                break
    if not table.rows:
        raise DataError("no examples", where=", ".join(inputs), hint="Give a file with at least one row")
    return table


def hold_out(table: Table, keys: Sequence[str], fraction: float) -> tuple[Table, Table]:
    """Splits a table by a hash of each row's key, so that equal keys stay together; `fraction` goes into the second.

    Raises:
        ConfigurationError: one of the two would be empty.
    """
    hashes = np.array([xxhash.xxh64_intdigest(key.encode("utf-8", "replace")) for key in keys], np.uint64)
    held = hashes < np.uint64(int(fraction * ((1 << 64) - 1)))
    if held.all() or not held.any():
        different = len(set(hashes.tolist()))
        raise ConfigurationError(
            f"{fraction} of {len(table):,} examples with {different:,} different inputs leaves "
            f"{'train' if held.all() else 'validation'} empty",
            where="data.validation_fraction",
            hint="Give --data.validation FILE, or another fraction",
        )
    return table.select(np.flatnonzero(~held).tolist()), table.select(np.flatnonzero(held).tolist())


NAME_IT = "Say which one it is by --data.columns (fat5 evaluate: --columns), as in --data.columns.label NAME"


def missing_column(name: str, row: Any, where: object) -> DataError:
    """The error for a column that a row does not have; suggests close names, nested ones included."""
    columns = list(_paths(row))
    near = _close_columns(name, columns)
    shown = ", ".join(columns[:20]) + ", …" * (len(columns) > 20) if columns else "none"
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    return DataError(f"no column {name!r}; it has {shown}", where=where, hint=f"{meant}{NAME_IT}")


def _paths(row: Any, before: str = "") -> Iterator[str]:
    for key, value in row.items() if isinstance(row, dict) else ():
        yield f"{before}{key}"
        if isinstance(value, dict) and before.count(".") < 3:
            yield from _paths(value, f"{before}{key}.")


def _close_columns(name: str, columns: Sequence[str]) -> list[str]:
    """The columns that a wrong name may mean: its own in other letters, nested ones, and names spelled alike."""
    lowered = {column.lower(): column for column in reversed(columns)}
    near = [lowered[one] for one in get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    return list(dict.fromkeys(near + [path for path in columns if path.endswith(f".{name}")]))
