"""Corpora: every form, cut anywhere, read whole; and fault 20, each kind of bad input with its place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fat5.data.text import formats, rows
from fat5.data.text.corpus import Corpus, is_dataset, open_corpus
from fat5.data.text.rows import CorpusOptions
from fat5.errors import DataError

zstandard = pytest.importorskip("zstandard")

TEXTS = ["Le chat dort.", "Deux\nlignes, « é ».", "日本", 'des "guillemets", et une virgule', "fin"]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts)))


def compressed(content: bytes, extension: str) -> bytes:
    """In two members or frames, as parallel compressors write, where there is a codec."""
    half = content.index(b"\n") + 1
    codec = Path(extension).suffix
    if codec not in formats.CODECS:
        return content
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[codec]
    return pack(content[:half]) + pack(content[half:])


def write_form(folder: Path, extension: str, texts: list[str]) -> Path:
    path = folder / f"corpus{extension}"
    if extension == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), path, row_group_size=2)
        return path
    if extension.startswith(".json"):
        content = "".join(json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts))
    elif extension.startswith(".csv"):
        buffer = io.StringIO()
        csv.writer(buffer).writerows([["n", "text"], *enumerate(texts)])
        content = buffer.getvalue()
    else:
        content = "\n\n".join(texts) + "\n"
    path.write_bytes(compressed(content.encode(), extension))
    return path


def read_all(corpus: Corpus) -> list[str]:
    return [row.text for chunk in corpus.chunks() for row in corpus.read(chunk)]


@pytest.mark.parametrize("extension", formats.EXTENSIONS)
def test_every_form_gives_its_texts(tmp_path: Path, extension: str) -> None:
    assert read_all(open_corpus([str(write_form(tmp_path, extension, TEXTS))])) == TEXTS


@pytest.mark.parametrize("target", [1, 7, 40, 10_000])
@pytest.mark.parametrize("extension", [".txt", ".jsonl", ".parquet"])
def test_cut_anywhere_the_texts_are_the_same(
    tmp_path: Path, extension: str, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fat5.data.text.corpus.SMALLEST_CHUNK", target)
    corpus = open_corpus([str(write_form(tmp_path, extension, TEXTS * 3))])
    assert len(corpus.chunks()) > 1 or target > 1000
    assert read_all(corpus) == TEXTS * 3


@settings(max_examples=300, deadline=None)
@given(
    content=st.lists(st.sampled_from(["a", "bé", "\n", "\n\n", " \n", "\r\n", "ccc ccc", "\n\n\n\n"]), max_size=40),
    parts=st.integers(1, 12),
    documents=st.sampled_from(["paragraph", "line"]),
)
def test_txt_cut_anywhere_is_txt_read_whole(
    tmp_path_factory: pytest.TempPathFactory, content: list[str], parts: int, documents: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes("".join(content).encode())
    size = path.stat().st_size
    options = CorpusOptions(txt_documents=documents)

    def texts(points: list[int]) -> list[str]:
        chunks = [rows.Chunk(str(path), start, stop, stop - start) for start, stop in pairwise(points)]
        return [row.text for chunk in chunks for row in formats.read_rows(chunk, options)]

    whole = texts([0, size])
    assert texts([size * part // parts for part in range(parts + 1)]) == whole
    words = sum(len(text.split()) for text in whole)
    assert words == len(path.read_text().split())


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("paragraph", ["a\n  b", "c"]),
        ("line", ["a", "  b", "", "", "c"]),
        ("file", ["\ufeffa\n  b\n\n\nc\n".removeprefix("\ufeff")]),
    ],
)
def test_what_a_document_is_in_txt(tmp_path: Path, documents: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_text("\ufeffa\n  b\n\n\nc\n", encoding="utf-8")
    assert read_all(open_corpus([str(tmp_path)], CorpusOptions(txt_documents=documents))) == expected


def test_folders_are_searched_in_order_without_hidden_or_other_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/.hidden.txt", "a/README.md", "a/dataset_info.json", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_all(open_corpus([str(tmp_path)])) == ["a/1.txt", "b/2.txt"]


def test_the_same_file_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert read_all(open_corpus([str(tmp_path), str(tmp_path / "a.txt")])) == ["a"]


def test_the_sample_has_a_name_of_its_own() -> None:
    corpus = open_corpus(["sample:fr", "sample:de"])
    assert corpus.name == "fr.jsonl.gz and 1 more"
    assert len(list(corpus.rows())) == 1923 + 2341


def test_tiny_files_share_tasks_and_large_ones_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fat5.data.text.corpus.SMALLEST_CHUNK", 100)
    for index in range(50):
        (tmp_path / f"{index:02d}.txt").write_text("x" * 10)
    (tmp_path / "z.jsonl").write_text('{"text": "yyyyyyyyyyy"}\n' * 50)
    corpus = open_corpus([str(tmp_path)])
    tasks = corpus.tasks()
    assert len(tasks) == 17
    assert [chunk for task in tasks for chunk in task] == corpus.chunks()


def test_rows_stop_at_the_limit_and_leave_empty_ones_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a", "", "b", "c"])
    assert list(open_corpus([str(tmp_path)]).rows(2)) == ["a", "b"]


def test_null_text_is_empty_and_further_columns_come_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null, "url": "u"}\n\n{"text": "b", "url": "v"}\n')
    corpus = open_corpus([str(tmp_path)])
    rows = list(corpus.read(corpus.chunks()[0], ("url", "absent")))
    assert [(row.text, row.columns) for row in rows] == [("", {"url": "u"}), ("b", {"url": "v"})]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:wikimedia/wikipedia", True),
        ("uonlp/CulturaX", True),
        ("data/fr.jsonl", False),
        ("./data", False),
        ("nowhere.txt", False),
        ("a/b/c", False),
    ],
)
def test_what_names_a_dataset(name: str, expected: bool) -> None:
    assert is_dataset(name) == expected


def test_a_dataset_is_streamed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    assert list(open_corpus([f"hf:{tmp_path}"]).rows(3)) == TEXTS[:3]


@pytest.mark.parametrize("row", ['{"text": "a", "score": NaN}', '{"score": -Infinity, "text": "a"}'])
def test_python_numbers_in_other_columns_are_read(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(row + '\n{"text": "b"}\n')
    assert read_all(open_corpus([str(tmp_path)])) == ["a", "b"]


def test_the_name_of_the_column_may_occur_in_a_row_again(tmp_path: Path) -> None:
    row = {"type": "text", "text": 'le mot "text"', "meta": {"text": "not this"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert read_all(open_corpus([str(tmp_path)])) == ['le mot "text"']


def test_nested_columns_are_named_with_dots(tmp_path: Path) -> None:
    rows = [{"translation": {"fr": "un", "en": "one"}}, {"translation": {"fr": None}}, {"translation": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"translation.fr": ["un"]}), tmp_path / "dot.parquet")
    (tmp_path / "a.csv").write_text("n,translation.fr\n1,un\n")
    options = CorpusOptions(text_column="translation.fr")
    for name, texts in (("a.jsonl", ["un", "", ""]), ("a.parquet", ["un", "", ""]), ("dot.parquet", ["un"])):
        assert read_all(open_corpus([str(tmp_path / name)], options)) == texts
    assert read_all(open_corpus([str(tmp_path / "a.csv")], options)) == ["un"]
    for name in ("a.jsonl", "a.parquet"):
        for column, said in (("translation.de", "it has en, fr"), ("translation", "Name one of translation.")):
            with pytest.raises(DataError, match=said):
                read_all(open_corpus([str(tmp_path / name)], CorpusOptions(text_column=column)))


TEXT = pyarrow.string()
TYPES = [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), TEXT)]


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("column", ["text", "nested.text"])
def test_parquet_holds_text_in_several_types(tmp_path: Path, kind: pyarrow.DataType, column: str) -> None:
    texts = pyarrow.array(["été", None, "été", "fin"]).cast(kind)
    table = pyarrow.table({"text": texts, "nested": pyarrow.StructArray.from_arrays([texts], ["text"])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert pyarrow.parquet.read_schema(tmp_path / "a.parquet").field("text").type == kind
    assert read_all(open_corpus([str(tmp_path)], CorpusOptions(text_column=column))) == ["été", "", "été", "fin"]


@pytest.mark.parametrize(
    ("name", "content", "texts", "bad", "first"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\nnope\n{"text": 3}\n{"n": 1}\n{"text": "\xff"}\n{"text": "b"}',
            "ab",
            4,
            ":2: not J",
        ),
        ("a.json.gz", b'{"text": "a"}\n' + b"x" * 2000 + b'\n{"text": "b"}', "ab", 1, ":2: a line longer"),
        ("a.csv", b'n,text\n1,a\n2,b, c\n3,"\xff\n3,"\n\n4,d\n5\n', "ad", 3, ":3: fields in this row: 3"),
        ("a.txt", b"a\n\nb\n\xff\nb\n\nc\n\n" + b"x\n" * 2000 + b"\nd", "acd", 2, ":4: invalid UTF-8"),
        ("a.txt.zst", b"a\n\n" + b"x" * 2000 + b"\nb\n\nc\n", "ac", 1, ":3: a line longer"),
    ],
)
def test_bad_rows_are_skipped_and_counted_if_asked(
    tmp_path: Path, name: str, content: bytes, texts: str, bad: int, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, formats):
        monkeypatch.setattr(module, "LARGEST_DOCUMENT", 1000)
    (tmp_path / name).write_bytes(compressed(content, name))
    corpus = open_corpus([str(tmp_path)], CorpusOptions(on_bad_row="skip"))
    for _ in range(2):
        assert list(corpus.rows()) == list(texts)
        assert corpus.bad_rows.count == bad
    assert name + first in corpus.bad_rows.first
    with pytest.raises(DataError, match=first):
        read_all(open_corpus([str(tmp_path)]))


@pytest.mark.parametrize("content", [b'text\n"a"b\nc\n', b'text\n"a\nb\n', b"body\na\n"])
def test_a_file_that_is_bad_as_a_whole_is_never_skipped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"not CSV|no column"):
        read_all(open_corpus([str(tmp_path)], CorpusOptions(on_bad_row="skip")))


def test_csv_keeps_quoted_line_ends_and_drops_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,n\r\n"un,\r\ndeux",1\r\n\r\n"trois\n""quatre""",2\r\n')
    assert read_all(open_corpus([str(tmp_path)])) == ["un,\r\ndeux", 'trois\n"quatre"']


# Bad input: a function that writes it, its file, what must be said

Writer = Callable[[Path], object]
BAD: dict[str, tuple[str, Writer, str]] = {
    "empty": ("a.jsonl", lambda p: p.write_bytes(b""), r"a\.jsonl: this file is empty"),
    "binary-junk": ("a.txt", lambda p: p.write_bytes(random.Random(0).randbytes(5000)), r"a\.txt.*(binary|UTF-8)"),
    "nul-bytes": ("a.jsonl", lambda p: p.write_bytes(b"abc\x00def"), "not .jsonl but binary data"),
    "utf-16": ("a.txt", lambda p: p.write_text("été", encoding="utf-16"), "UTF-16"),
    "pickle-as-jsonl": ("a.jsonl", lambda p: p.write_bytes(pickle.dumps({"a": 1})), "a pickle, which FAT5 never loads"),
    "pickle-as-parquet": ("a.parquet", lambda p: p.write_bytes(pickle.dumps([1])), "a pickle, which FAT5 never loads"),
    "zip-as-csv": ("a.csv", lambda p: p.write_bytes(b"PK\x03\x04aaaa"), "zip archive"),
    "gzip-as-jsonl": ("a.jsonl", lambda p: p.write_bytes(gzip.compress(b"{}")), "gzip data"),
    "text-as-gzip": ("a.jsonl.gz", lambda p: p.write_bytes(b'{"text": "a"}\n'), "not .jsonl.gz but something else"),
    "cut-gzip": ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(random.Random(0).randbytes(9999))[:5000]), "."),
    "cut-zstd": (
        "a.jsonl.zst",
        lambda p: p.write_bytes(zstandard.compress(b'{"text": "abc"}\n' * 99)[:20]),
        r"a\.jsonl\.zst",
    ),
    "cut-parquet": ("a.parquet", lambda p: p.write_bytes(b"PAR1" + b"x" * 100), "Parquet data is damaged"),
    "invalid-utf8-jsonl": (
        "a.jsonl",
        lambda p: p.write_bytes(b'{"text": "a"}\n{"text": "\xe9t\xe9"}\n'),
        r"a\.jsonl:2: invalid UTF-8 \(byte 0xe9 at column 11\)",
    ),
    "invalid-utf8-txt": ("a.txt", lambda p: p.write_bytes(b"a\n\nb \xff\n"), r"a\.txt:3: invalid UTF-8"),
    "invalid-utf8-csv": ("a.csv", lambda p: p.write_bytes(b"text\na\n\xff\n"), r"a\.csv:3: invalid UTF-8"),
    "not-json": ("a.jsonl", lambda p: p.write_text('{"text": "a"}\nnope\n'), r"a\.jsonl:2: not JSON"),
    "cut-json": ("a.jsonl", lambda p: p.write_text('{"text": "a'), r"a\.jsonl:1: not JSON"),
    "not-an-object": ("a.jsonl", lambda p: p.write_text('["a"]\n'), r"a\.jsonl:1: not a JSON object"),
    "wrong-column-jsonl": ("a.jsonl", lambda p: p.write_text('{"content": "a", "id": 1}\n'), "it has content, id"),
    "wrong-column-csv": ("a.csv", lambda p: p.write_text("id,content\n1,a\n"), r"it has content, id.*text_column"),
    "wrong-column-parquet": (
        "a.parquet",
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), p),
        "it has body",
    ),
    "numbers-jsonl": ("a.jsonl", lambda p: p.write_text('{"text": 3}\n'), "holds int, not text"),
    "numbers-parquet": ("a.parquet", lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": [3]}), p), "int64"),
    "short-csv-row": (
        "a.csv",
        lambda p: p.write_text("id,text\n1,a\n2\n"),
        r"a\.csv:3: fields in this row: 1, in the header: 2",
    ),
    "unquoted-comma": (
        "a.csv",
        lambda p: p.write_text("text\nBonjour\nBonjour, le monde\n"),
        r"a\.csv:3: fields in this row: 2, in the header: 1\. Quote",
    ),
    "unquoted-comma-in-bz2": (
        "a.csv.bz2",
        lambda p: p.write_bytes(bz2.compress(b"text\nBonjour, le monde\n")),
        r"a\.csv\.bz2:2: fields in this row: 2",
    ),
    "csv-column-twice": ("a.csv", lambda p: p.write_text("text,text\na,b\n"), r"a\.csv:1: column 'text' stands twice"),
    "csv-without-header": (
        "a.csv",
        lambda p: p.write_text("Un texte.\nUn autre.\n"),
        "no column 'text'; it has Un texte",
    ),
    "csv-row-without-end": (
        "a.csv",
        lambda p: p.write_bytes(b'text\n"' + (b"a" * 1023 + b"\n") * (33 << 10)),
        "a row longer than 32 MiB",
    ),
    "tsv": ("a.tsv", lambda p: p.write_text("text\nun\n"), r"unknown extension.*\.json and \.csv"),
    "key-twice": (
        "a.jsonl",
        lambda p: p.write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n'),
        r"a\.jsonl:2: not JSON \(key 'text' stands twice\)",
    ),
    "half-a-surrogate-pair": (
        "a.jsonl",
        lambda p: p.write_text('{"text": "\\ud83d"}'),
        "not JSON .half of a surrogate",
    ),
    "deep": ("a.jsonl", lambda p: p.write_text('{"text": "a", "b": ' + "[" * 99_999), "not JSON .nested too deeply"),
    "array": ("a.json", lambda p: p.write_text('[{"text": "a"}, {"text": "b"}]'), "not a JSON object.*jq -c"),
    "pretty-array": ("a.json", lambda p: p.write_text('[\n {"text": "a"}\n]'), r"a\.json:1: not JSON.*jq -c"),
    "cut-bz2": ("a.txt.bz2", lambda p: p.write_bytes(bz2.compress(b"a\n" * 9999)[:40]), "damaged or cut short"),
    "cut-xz": ("a.txt.xz", lambda p: p.write_bytes(lzma.compress(b"a\n" * 9999)[:80]), "damaged or cut short"),
    "damaged-xz": ("a.txt.xz", lambda p: p.write_bytes(lzma.compress(b"a")[:6] + b"x" * 50), "damaged or cut short"),
    "nested-jsonl": ("a.jsonl", lambda p: p.write_text('{"text": {"fr": "a"}}'), "is nested. Name one of text.fr"),
    "open-csv-quote": ("a.csv", lambda p: p.write_text('id,text\n1,"a\n'), "not CSV"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(tmp_path: Path, case: str) -> None:
    name, write, said = BAD[case]
    write(tmp_path / name)
    with pytest.raises(DataError, match=said) as caught:
        read_all(open_corpus([str(tmp_path / name)]))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", *(f"a.jsonl{codec}" for codec in formats.CODECS)])
def test_a_line_that_never_ends_is_refused_before_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, formats):
        monkeypatch.setattr(module, "LARGEST_DOCUMENT", 1 << 20)
    first = b"text\n" if name == "a.csv" else b'{"text": "a"}\n'
    (tmp_path / name).write_bytes(compressed(first + b"a" * (3 << 20), name))
    with pytest.raises(DataError, match=r"a\.[a-z0-9.]+:2: a (line|row) longer than 1 MiB"):
        read_all(open_corpus([str(tmp_path / name)]))


BOMB = """
import resource, sys
from fat5.data.text.corpus import open_corpus
from fat5.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
said = ""
try:
    for text in open_corpus([sys.argv[1]]).rows():
        del text
except DataError as error:
    said = error
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, said)
"""


def test_a_small_file_of_one_huge_line_takes_little_memory(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    block = b"a" * (1 << 20)
    content = b"".join(compressor.compress(block) for _ in range(512)) + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert len(content) < 64_000
    found = subprocess.run([sys.executable, "-c", BOMB, str(tmp_path)], capture_output=True, text=True, check=True)
    kilobytes, _, said = found.stdout.partition(" ")
    assert "a.jsonl.zst:1: a line longer than 32 MiB" in said
    assert int(kilobytes) < 200_000


def test_a_small_parquet_file_of_huge_rows_takes_little_memory(tmp_path: Path) -> None:
    huge = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 128, pyarrow.int32()), pyarrow.array(["a" * (8 << 20)])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": huge}), tmp_path / "a.parquet", compression="zstd")
    with (tmp_path / "a.parquet").open("rb") as file:
        assert len(file.read()) < 64_000
    found = subprocess.run([sys.executable, "-c", BOMB, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(found.stdout.split()[0]) < 600_000


def test_a_paragraph_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_DOCUMENT", 1000)
    (tmp_path / "a.txt").write_text("une ligne\n" * 200)
    with pytest.raises(DataError, match=r"a\.txt:101: a paragraph longer.*txt_documents line"):
        read_all(open_corpus([str(tmp_path)]))


def test_the_line_of_a_fault_is_counted_from_the_top_of_a_cut_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fat5.data.text.corpus.SMALLEST_CHUNK", 64)
    lines = ['{"text": "good"}'] * 100
    lines[70] = "{bad"
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:71: not JSON"):
        read_all(open_corpus([str(tmp_path)]))


@pytest.mark.parametrize("name", ["b.tsv", "b.jsonl.lz4", "wiki.xml.bz2", "sub/b.ndjson"])
def test_data_of_a_form_that_is_not_read_is_not_passed_over_in_silence(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / name).write_text("b")
    with pytest.raises(DataError, match=rf"{name}: a form of data that is not read\. FAT5 reads \.txt, \.jsonl"):
        open_corpus([str(tmp_path)])


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    for inputs in ([""], ["a.txt", " "]):
        with pytest.raises(DataError, match=r"inputs: an input is empty text\. Give files, folders"):
            open_corpus(inputs)


@pytest.mark.parametrize(
    ("given_name", "said"),
    [
        ("missing.txt", r"missing\.txt: no such file or folder"),
        ("thesis.docx", r"thesis\.docx: unknown extension.*\.txt, \.jsonl"),
        ("folder", "no text files in this folder"),
        ("hf:/nowhere/at-all", "cannot be opened"),
        ("hf:/nowhere/at-all", "no file or folder here has that name"),
        ("hf:" + 300 * "a", "no file or folder here has that name"),
    ],
)
def test_what_cannot_be_a_corpus_is_refused(tmp_path: Path, given_name: str, said: str) -> None:
    (tmp_path / "thesis.docx").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    name = given_name if given_name.startswith("hf:") else str(tmp_path / given_name)
    with pytest.raises(DataError, match=said):
        open_corpus([name]).rows().__next__()
    with pytest.raises(DataError, match="cannot be mixed"):
        open_corpus(["hf:a/b", str(tmp_path)])
