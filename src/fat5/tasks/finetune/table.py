"""Tables of examples: files and datasets of the hub to columns, and the split held out for validation."""

import csv
import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fat5.data.text.corpus import SAMPLE, is_dataset, sample_path
from fat5.data.text.rows import Lines
from fat5.errors import ConfigurationError, DataError
from fat5.files import PICKLE_SUFFIXES, parse_json

CODECS = (".gz", ".bz2", ".xz", ".zst")
EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
READ = f"Files end in {', '.join(EXTENSIONS)}, all but .parquet also with {', '.join(CODECS)}"
LARGEST_JSON = 1 << 30


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
                raise DataError(f"column {name!r} holds {value!r:.60}, no text", where=self.where(index))
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
        import hashlib

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
        DataError: no such file, another form, a damaged row, or no row at all.
    """
    table = Table()
    for name in inputs:
        for source in _files(name):
            table.files.append(source)
            for number, row in _rows(source, split, subset):
                if limit is not None and len(table) >= limit:
                    return table
                if not isinstance(row, dict):
                    raise DataError(
                        f"row {number} is no object of columns", where=source, hint="A row is {column: value, …}"
                    )
                table.rows.append(row)
                table.file.append(len(table.files) - 1)
                table.number.append(number)
    if not table.rows:
        raise DataError("no examples", where=", ".join(inputs), hint="Give a file with at least one row")
    return table


def hold_out(table: Table, keys: Sequence[str], fraction: float) -> tuple[Table, Table]:
    """Splits a table by a hash of each row's key, so that equal keys stay together.

    Args:
        keys: the input of each row.
        fraction: share that goes into the second table.

    Raises:
        ConfigurationError: one of the two would be empty.
    """
    hashes = np.array([xxhash.xxh64_intdigest(key.encode("utf-8", "replace")) for key in keys], np.uint64)
    held = hashes < np.uint64(int(fraction * ((1 << 64) - 1)))
    if held.all() or not held.any():
        raise ConfigurationError(
            f"{fraction} of {len(table):,} examples leaves {'train' if held.all() else 'validation'} empty",
            where="data.validation_fraction",
            hint="Give --data.validation FILE, or another fraction",
        )
    return table.select(np.flatnonzero(~held).tolist()), table.select(np.flatnonzero(held).tolist())


def missing_column(name: str, row: Any, where: object) -> DataError:
    """The error for a column that a row does not have; suggests close names, nested ones included."""
    columns = list(_paths(row))
    near = get_close_matches(name, columns, n=3, cutoff=0.5) + [path for path in columns if path.endswith(f".{name}")]
    shown = ", ".join(columns[:20]) or "none"
    meant = f"Did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    return DataError(f"no column {name!r}; it has {shown}", where=where, hint=f"{meant}Name it with --data.columns")


def _paths(row: Any, before: str = "") -> Iterator[str]:
    for key, value in row.items() if isinstance(row, dict) else ():
        yield f"{before}{key}"
        if isinstance(value, dict) and before.count(".") < 3:
            yield from _paths(value, f"{before}{key}.")


def _files(name: str) -> list[str]:
    if name.startswith(SAMPLE) or is_dataset(name):
        return [name]
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError("no such file or folder", where=name, hint="Check the path; a hub dataset is hf:owner/name")
    if path.is_file():
        return [str(path)]
    found = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and _extension(file) in EXTENSIONS]
    if not found:
        raise DataError("no examples in this folder", where=name, hint=READ)
    return found


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return suffixes[0] if len(suffixes) == 2 and suffixes[1] in CODECS else (suffixes or [""])[-1]


def _rows(source: str, split: str, subset: str | None) -> Iterator[tuple[int, Any]]:
    if source.startswith(SAMPLE):
        return enumerate(_sample_rows(source.removeprefix(SAMPLE).split("-")), 1)
    return _hub_rows(source, split, subset) if is_dataset(source) else _file_rows(Path(source))


def _sample_rows(languages: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the sample corpus in one language, or its paragraphs that several languages have."""
    found = [{row["id"]: row for _, row in _file_rows(sample_path(language))} for language in languages]
    if len(found) == 1:
        yield from found[0].values()
        return
    for key, row in found[0].items():
        if all(key in others for others in found):
            texts = {language: others[key]["text"] for language, others in zip(languages, found, strict=True)}
            yield {"id": key, "chapter": row["chapter"], **texts}


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    extension = _extension(path)
    if extension in PICKLE_SUFFIXES:
        raise DataError("may be a pickle, which FAT5 never loads", where=path, hint=READ)
    if extension not in EXTENSIONS:
        raise DataError(f"the form {extension or 'without an ending'} is not read", where=path, hint=READ)
    try:
        if extension == ".parquet":
            yield from _parquet_rows(path)
        elif extension in (".csv", ".tsv"):
            yield from _csv_rows(path, "\t" if extension == ".tsv" else ",")
        else:
            yield from _json_rows(path)
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"damaged ({error})", where=path, hint="Fetch it again") from error


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """A JSON object a line, or one array of objects, or an object with the rows under `data`, as SQuAD has it."""
    lines = Lines(str(path))
    number = 0
    for line in lines:
        text = lines.text(line).strip()
        if not text:
            continue
        if number == 0 and (text.startswith("[") or (text.startswith("{") and not _is_object(text))):
            yield from enumerate(_whole_json(path), 1)
            return
        number += 1
        try:
            yield number, parse_json(text, strict=True)
        except ValueError as error:
            raise DataError(f"not JSON ({error})", where=lines.where(), hint="Mend or remove the line") from error


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def _whole_json(path: Path) -> list[Any]:
    lines = Lines(str(path))
    size, parts = 0, []
    for line in lines:
        parts.append(lines.text(line))
        size += len(line)
        if size > LARGEST_JSON:
            raise DataError("a JSON document above 1 GiB", where=path, hint="Write one object a line (.jsonl)")
    try:
        content = parse_json("".join(parts), strict=True)
    except ValueError as error:
        raise DataError(f"not JSON ({error})", where=path, hint="Write one object a line (.jsonl)") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError("no list of rows", where=path, hint="Write one object a line (.jsonl)")
    return _squad_rows(content) if any(isinstance(row, dict) and "paragraphs" in row for row in content) else content


def _squad_rows(articles: list[Any]) -> list[dict[str, Any]]:
    """SQuAD's articles of paragraphs of questions as one row a question."""
    rows = []
    for article in articles:
        for paragraph in article.get("paragraphs", []):
            for question in paragraph.get("qas", []):
                given = question.get("answers", [])
                answers = {key: [answer.get(key) for answer in given] for key in ("text", "answer_start")}
                rows.append(
                    {
                        "id": question.get("id"),
                        "question": question.get("question"),
                        "context": paragraph.get("context"),
                        "answers": answers,
                    }
                )
    return rows


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    lines = Lines(str(path))
    decoded = (lines.text(line) for line in lines)
    reader = csv.DictReader(decoded, delimiter=delimiter, restkey="")
    try:
        for number, row in enumerate(reader, 1):
            if "" in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise DataError(f"a row without {columns} columns", where=lines.where(), hint="Quote texts with commas")
            yield number, row
    except csv.Error as error:
        raise DataError(f"not CSV ({error})", where=lines.where()) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError("Parquet data is damaged", where=path, hint="Fetch it again") from error


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[tuple[int, Any]]:
    """Rows of a dataset; code that comes with it is never run. A class label appears by its name."""
    import datasets

    try:
        dataset = datasets.load_dataset(name.removeprefix("hf:"), subset, split=split)
    except Exception as error:  # datasets, the hub and the network raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"split {split} of this dataset cannot be opened ({reason})",
            where=name,
            hint="Check its name, data.subset and splits, and the network",
        ) from error
    named = {key: kind for key, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, row in enumerate(dataset, 1):
        for key, kind in named.items():
            if row[key] is not None and row[key] >= 0:
                row[key] = kind.int2str(row[key])
        yield number, dict(row)
