"""Corpora: files, folders or a Hugging Face dataset, cut into chunks that can be read independently and in any order.

Reading is strict: a damaged line, a wrong column or a binary file raises an error with file and line. With `on_bad_row:
skip`, rows that cannot be read are counted instead. Files are streamed, and a line above `LARGEST_DOCUMENT` is refused.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fat5.data.text.formats import CODECS, READ, extension_of, read_rows, sniff, split
from fat5.data.text.rows import BadRows, Chunk, CorpusOptions, CorpusRow, missing_column, row_text
from fat5.errors import DataError

SAMPLE = "sample:"
SAMPLE_LANGUAGES = ("fr", "en", "de")
SMALLEST_CHUNK = 2 << 20
LARGEST_CHUNK = 256 << 20
CHUNKS = 256
STREAMED_ROWS = 1000  # of a dataset, decoded at a time
# Files that the datasets library writes beside its data.
NO_DATA = ("dataset_info.json", "dataset_infos.json")
# Files that likely hold text, and are refused; others in a folder (README.md, pictures) are ignored.
UNREAD = (*CODECS, ".lz4", ".br", ".lzma", ".tsv", ".ndjson", ".arrow")


@dataclass
class Corpus:
    """A corpus of local files, or one Hugging Face dataset (`dataset` is its name then, and `files` is empty).

    Attributes:
        bad_rows: rows skipped by `read`, or by the last pass of `rows`.
    """

    options: CorpusOptions
    files: list[str] = field(default_factory=list)
    dataset: str | None = None
    bad_rows: BadRows = field(default_factory=BadRows)

    @property
    def name(self) -> str:
        """A short name: the dataset's, or that of the first file."""
        if self.dataset is not None:
            return self.dataset
        return Path(self.files[0]).name + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    @property
    def bytes(self) -> int:
        """Bytes on disk; 0 for a streamed dataset."""
        return sum(os.path.getsize(path) for path in self.files)

    def chunks(self) -> list[Chunk]:
        """The whole corpus in order, in parts of about a 256th (2 MiB to 256 MiB); a dataset in one."""
        if self.dataset is not None:
            return [Chunk(self.dataset, 0, 1, 0)]
        return [chunk for path in self.files for chunk in split(path, self._chunk_bytes(), self.options)]

    def tasks(self) -> list[list[Chunk]]:
        """Chunks in groups, so that a thousand tiny files do not make a thousand tasks."""
        groups: list[list[Chunk]] = []
        target = filled = self._chunk_bytes()
        for chunk in self.chunks():
            if filled + chunk.bytes > target:
                groups.append([])
                filled = 0
            groups[-1].append(chunk)
            filled += chunk.bytes
        return groups

    def read(self, chunk: Chunk, columns: tuple[str, ...] = ()) -> Iterator[CorpusRow]:
        """Rows of one chunk, with the other named columns that exist; DataError as `on_bad_row` says."""
        read = read_rows if self.dataset is None else _read_streamed
        for row in read(chunk, self.options, columns):
            if isinstance(row, CorpusRow):
                yield row
            elif self.options.on_bad_row == "refuse":
                raise row
            else:
                self.bad_rows.add(row)

    def rows(self, limit: int | None = None) -> Iterator[str]:
        """Texts of the corpus in order, at most `limit`, without empty ones."""
        self.bad_rows = BadRows()
        yield from islice((row.text for chunk in self.chunks() for row in self.read(chunk) if row.text), limit)

    def _chunk_bytes(self) -> int:
        return min(max(self.bytes // CHUNKS, SMALLEST_CHUNK), LARGEST_CHUNK)


def open_corpus(inputs: list[str], options: CorpusOptions | None = None) -> Corpus:
    """Opens files, folders (searched recursively), or one Hugging Face dataset.

    `owner/name` is a dataset of the hub if there is no such path; `hf:NAME` always is. `sample:fr` (en, de) is the
    sample corpus that ships with FAT5. DataError if an input is missing or empty, or its content belies its extension.
    """
    options = options or CorpusOptions()
    if not inputs:
        raise DataError("no corpus given", hint="Give files, folders or a Hugging Face dataset")
    if not all(name.strip() for name in inputs):  # an unset variable of a shell; Path("") is the current folder
        raise DataError("an input is empty text", where="inputs", hint="Give files, folders or a Hugging Face dataset")
    inputs = [str(sample_path(name.removeprefix(SAMPLE))) if name.startswith(SAMPLE) else name for name in inputs]
    datasets = [name for name in inputs if is_dataset(name)]
    if datasets:
        if len(inputs) > 1:
            raise DataError("a Hugging Face dataset cannot be mixed with other inputs", where=datasets[0])
        return Corpus(options, dataset=datasets[0].removeprefix("hf:"))
    files: list[str] = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            files += files_in(path, extension_of, "text files", READ)
        elif path.exists():
            files.append(str(path))
        else:
            raise DataError("no such file or folder", where=name, hint="Check the path; a hub dataset is hf:owner/name")
    for file in dict.fromkeys(files):
        sniff(file)
    return Corpus(options, files=list(dict.fromkeys(files)))


def sample_path(language: str = "fr") -> Path:
    """The sample corpus that ships with FAT5, in fr, en or de: gzipped JSON lines of `id`, `chapter`, `text`.

    It holds paragraphs of the Debian Administrator's Handbook; those of one `id` are translations of each other.
    """
    if language not in SAMPLE_LANGUAGES:
        raise DataError(f"no sample corpus in {language!r}", hint=f"Choose from {', '.join(SAMPLE_LANGUAGES)}")
    return Path(__file__).parents[1] / "sample" / f"{language}.jsonl.gz"


def is_dataset(name: str) -> bool:
    """Whether a name means a Hugging Face dataset rather than a path."""
    if name.startswith("hf:"):
        return True
    parts = name.split("/")
    return (
        len(parts) == 2
        and all(parts)
        and parts[0] not in (".", "..", "~")
        and not Path(name).exists()
        and (extension_of(name) is None and not Path(parts[0]).exists())
    )


def load_streamed(name: str, options: CorpusOptions) -> Any:
    """A Hugging Face dataset as a stream, checked for the text column; code that comes with a dataset is never run."""
    import datasets

    with opening_dataset(name, "this dataset", "Check its name, subset and split, and the network"):
        stream = datasets.load_dataset(name, options.subset, split=options.split, streaming=True)
        columns = stream.column_names
    if columns is not None and not {options.text_column, options.text_column.split(".")[0]} & set(columns):
        raise missing_column(options.text_column, columns, name)
    return stream


@contextmanager
def opening_dataset(name: str, what: str, hint: str) -> Iterator[None]:
    """Turns whatever stands in the way of a dataset of the hub into a DataError."""
    try:
        yield
    except Exception as error:  # datasets, the hub and the network raise many kinds
        reason = " ".join(str(error).split())[:200]
        if not os.path.exists(name):  # a path with a slip is looked for on the hub too
            hint += "; no file or folder here has that name"
        raise DataError(f"{what} cannot be opened ({reason})", where=name, hint=hint) from error


def _read_streamed(part: Chunk, options: CorpusOptions, columns: Sequence[str] = ()) -> Iterator[CorpusRow | DataError]:
    """As `read_rows`, of every `stop`-th shard of the dataset `path` from the one numbered `start` on."""
    stream = load_streamed(part.path, options).shard(num_shards=part.stop, index=part.start, contiguous=False)
    number = 0
    for batch in stream.iter(STREAMED_ROWS):
        for values in zip(*batch.values()):
            row, number = dict(zip(batch, values)), number + 1
            found: CorpusRow | DataError
            try:
                text = row_text(row, options.text_column, f"{part.path}, part {part.start}, row {number}")
                found = CorpusRow(text, number, {name: row[name] for name in columns if name in row})
            except DataError as error:
                found = error
            yield found


def files_in(folder: Path, extension: Callable[[Path], str | None], what: str, hint: str) -> list[str]:
    """The files of a folder and those below it that have a known extension, by name; hidden ones are left out.

    DataError if there is none, or one that likely holds data in another form; `hint` says which forms are read.
    """
    found = []
    for path in sorted(folder.rglob("*"), key=str):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.name in NO_DATA or not path.is_file():
            continue
        if extension(path):
            found.append(str(path))
        elif path.suffix.lower() in UNREAD:
            raise DataError("a form of data that is not read", where=path, hint=f"{hint}; convert it or move it away")
    if not found:
        raise DataError(f"no {what} in this folder", where=folder, hint=hint)
    return found
