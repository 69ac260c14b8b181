"""Rows of examples from files, datasets of the hub, and the sample corpus. Damage is refused with its file and row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fat5.data.text.corpus import SAMPLE, files_in, is_dataset, opening_dataset, sample_path
from fat5.data.text.formats import CODECS, csv_rows, naming_damage, open_parquet, sniff
from fat5.data.text.rows import Lines, decompressed
from fat5.errors import DataError
from fat5.files import PICKLE_SUFFIXES, parse_json

FORMS = (".jsonl", ".json", ".csv", ".tsv")
READ = f"FAT5 reads {', '.join(FORMS)} (also {', '.join(CODECS)} of them) and .parquet"
LARGEST_JSON = 1 << 30
"""Bytes of a JSON document, which is read whole."""

HOW_LINES_LOOK = "A line is an object, {column: value, …}"


def find_sources(name: str) -> list[str]:
    """The files behind a path, those of a folder in the order of their names; or the name of a dataset of the hub, or
    of the sample corpus.

    Raises:
        DataError: no such file or folder, a folder without examples, or one with a form of data that is not read.
    """
    path = Path(name).expanduser()
    if name.startswith(("hf:", SAMPLE)) or (is_dataset(name) and _extension(path) is None):
        return [name]
    if not path.exists():
        raise DataError("no such file or folder", where=name, hint="Check the path; a hub dataset is hf:owner/name")
    return files_in(path, _extension, "examples", READ) if path.is_dir() else [str(path)]


def source_rows(source: str, split: str, subset: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a file, of a split of a dataset on the hub, or of the sample corpus.

    Raises:
        DataError: another form, damage, or a row that is no object of columns.
    """
    for number, row in _rows(source, split, subset):
        if not isinstance(row, dict):
            raise DataError("no object of columns", where=f"{source}, row {number}", hint=HOW_LINES_LOOK)
        yield number, row


def _rows(source: str, split: str, subset: str | None) -> Iterator[tuple[int, Any]]:
    if source.startswith(SAMPLE):
        return enumerate(_sample_rows(source.removeprefix(SAMPLE).split("-")), 1)
    is_file = Path(source).exists() or _extension(Path(source)) is not None
    return _file_rows(source) if is_file else _hub_rows(source, split, subset)


def _sample_rows(languages: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the sample corpus in one language, or its paragraphs that several languages have."""
    found = [{row["id"]: row for _, row in _file_rows(str(sample_path(language)))} for language in languages]
    if len(found) == 1:
        yield from found[0].values()
        return
    for key, row in found[0].items():
        if all(key in others for others in found):
            texts = {language: others[key]["text"] for language, others in zip(languages, found, strict=True)}
            yield {"id": key, "chapter": row["chapter"], **texts}


def _extension(path: Path) -> str | None:
    """`.csv` or `.csv.gz`, in lower case; None for a form that is not read."""
    name = path.name.lower()
    endings = (".parquet", *(form + codec for form in FORMS for codec in ("", *CODECS)))
    return next((ending for ending in endings if name.endswith(ending)), None)


def _file_rows(source: str) -> Iterator[tuple[int, Any]]:
    path = Path(source)
    extension = _extension(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise DataError("may be a pickle, which FAT5 never loads", where=path, hint=READ)
    if extension is None:
        raise DataError(f"the form {path.suffix or 'without an ending'} is not read", where=path, hint=READ)
    if not path.is_file():
        raise DataError("is no regular file", where=path, hint="Write the examples to a file")
    sniff(source, extension)
    with naming_damage(path):
        if extension == ".parquet":
            yield from _parquet_rows(source)
        elif extension.startswith((".csv", ".tsv")):
            yield from _csv_rows(source, "\t" if extension.startswith(".tsv") else ",")
        elif extension.startswith(".jsonl") or _is_lines(source):
            yield from _json_lines(source)
        else:
            yield from enumerate(_whole_json(source), 1)


def _is_lines(source: str) -> bool:
    """Whether a .json file has an object a line: its first line is one, and another line follows."""
    lines = Lines(source)
    first = True
    for line in lines:
        if line.isspace():
            continue
        if not first:
            return True
        first = False
        try:
            if not isinstance(parse_json(lines.text(line)), dict):
                return False
        except (ValueError, DataError):
            return False
    return False


def _json_lines(source: str) -> Iterator[tuple[int, Any]]:
    lines = Lines(source)
    number = 0
    for line in lines:
        text = lines.text(line)
        if not text.strip():
            continue
        number += 1
        try:
            row = parse_json(text, strict=True)
        except ValueError as error:
            hint = "A file with one array of rows ends in .json" if text.lstrip().startswith("[") else HOW_LINES_LOOK
            raise DataError(f"not JSON ({error})", where=lines.where(), hint=hint) from error
        if isinstance(row, list):
            hint = "A file with one array of rows ends in .json"
            raise DataError("an array, no object of columns", where=lines.where(), hint=hint)
        yield number, row


def _whole_json(source: str) -> list[Any]:
    """An array of rows, an object with the rows under `data`, as SQuAD has it, or one row."""
    with open(source, "rb") as raw:
        content = decompressed(raw, source.lower())[0].read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise DataError("a JSON document above 1 GiB", where=source, hint="Write one object a line (.jsonl)")
    try:
        found = parse_json(content.decode("utf-8-sig"), strict=True)
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 (byte {error.start:,})", where=source, hint="Convert it to UTF-8") from error
    except ValueError as error:
        raise DataError(f"not JSON ({error})", where=source, hint="Mend it, or write one object a line") from error
    if isinstance(found, dict):
        found = found["data"] if isinstance(found.get("data"), list) else [found]
    if not isinstance(found, list):
        raise DataError("no list of rows", where=source, hint="Write one object a line (.jsonl)")
    nested = [isinstance(row, dict) and "paragraphs" in row for row in found]
    return list(_squad_rows(found, source)) if any(nested) else found


def _squad_rows(articles: list[Any], source: str) -> Iterator[dict[str, Any]]:
    """SQuAD's articles of paragraphs of questions as one row a question."""
    for place, article in enumerate(articles):
        for paragraph in _objects(article, "paragraphs", source, f"data[{place}]"):
            for question in _objects(paragraph, "qas", source, f"data[{place}].paragraphs"):
                given = _objects(question, "answers", source, f"data[{place}].paragraphs.qas", required=False)
                yield {
                    "id": question.get("id"),
                    "question": question.get("question"),
                    "context": paragraph.get("context"),
                    "answers": {key: [answer.get(key) for answer in given] for key in ("text", "answer_start")},
                }


def _objects(row: dict[str, Any], key: str, source: str, where: str, required: bool = True) -> list[dict[str, Any]]:
    found = row.get(key, None if required else []) if isinstance(row, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError(
            f"{where} has no list of objects {key!r}",
            where=source,
            hint="SQuAD's form is {data: [{paragraphs: [{context: …, qas: [{question: …, answers: […]}]}]}]}",
        )
    return found


def _csv_rows(source: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    rows = csv_rows(source, delimiter)
    names, _ = next(rows)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"column {twice!r} stands twice", where=f"{source}:1", hint="Rename one")
    if len(names) == 1 and (sign := next((sign for sign in ";\t|" if sign in names[0]), None)):
        what = f"one column, {names[0]!r:.60}: {sign!r} stands between values in place of {delimiter!r}"
        raise DataError(what, where=f"{source}:1", hint="Write .csv with commas, or .tsv with tabs")
    for number, (values, _) in enumerate(rows, 1):
        if isinstance(values, DataError):
            raise values
        yield number, dict(zip(names, values, strict=True))


def _parquet_rows(source: str) -> Iterator[tuple[int, Any]]:
    import pyarrow

    file = open_parquet(source)
    names = file.schema_arrow.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"column {twice!r} stands twice", where=source, hint="Rename one")
    number = 0
    try:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError("Parquet data is damaged", where=source, hint="Fetch it again") from error


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[tuple[int, Any]]:
    """Rows of a dataset; code that comes with it is never run. A class label, or a list of them, appears by name."""
    import datasets

    hint = "Check its name, subset and splits, and the network"
    with opening_dataset(name, f"split {split} of this dataset", hint):
        dataset = datasets.load_dataset(name.removeprefix("hf:"), subset, split=split)
    for number, row in enumerate(dataset, 1):
        yield number, {key: _named(value, dataset.features[key]) for key, value in row.items()}


def _named(value: Any, kind: Any) -> Any:
    """A value of a dataset with class numbers as names; -1, which stands for no label, stays."""
    if isinstance(value, dict) and isinstance(kind, dict):
        return {key: _named(one, kind[key]) for key, one in value.items()}
    if isinstance(value, list) and (inner := getattr(kind, "feature", None)) is not None:
        return [_named(one, inner) for one in value]
    if hasattr(kind, "int2str") and isinstance(value, int) and value >= 0:
        return kind.int2str(value)
    return value
