"""Corpora: every form, cut anywhere, read whole; and fault 20, each kind of bad input with its place."""

import gzip
import io
import json
import pickle
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fat5.data import formats, lines
from fat5.data.corpus import Corpus, CorpusOptions, is_dataset, open_corpus
from fat5.errors import DataError

TEXTS = ["Le chat dort.", "Deux\nlignes, « é ».", "日本", 'des "guillemets", et une virgule', "fin"]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts)))


def write_form(folder: Path, extension: str, texts: list[str]) -> Path:
    path = folder / f"corpus{extension}"
    plain = folder / "plain"
    write_jsonl(plain, texts)
    lines = plain.read_bytes()
    plain.unlink()
    if extension == ".jsonl":
        path.write_bytes(lines)
    elif extension == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif extension == ".jsonl.zst":
        # Two frames, as parallel compressors write.
        half = lines.index(b"\n") + 1
        compressor = zstandard.ZstdCompressor()
        path.write_bytes(compressor.compress(lines[:half]) + compressor.compress(lines[half:]))
    elif extension == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), path, row_group_size=2)
    elif extension == ".csv":
        import csv

        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerows([["n", "text"], *enumerate(texts)])
        path.write_text(buffer.getvalue(), newline="")
    else:
        path.write_text("\n\n".join(texts) + "\n")
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
    monkeypatch.setattr("fat5.data.corpus.SMALLEST_CHUNK", target)
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
    tmp_path_factory: pytest.TempPathFactory, content: list[str], parts: int, documents: formats.TxtDocuments
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes("".join(content).encode())
    size = path.stat().st_size

    def texts(points: list[int]) -> list[str]:
        pairs = pairwise(points)
        return [r.text for start, stop in pairs for r in formats.read_rows(str(path), start, stop, "text", documents)]

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
def test_what_a_document_is_in_txt(tmp_path: Path, documents: formats.TxtDocuments, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_text("\ufeffa\n  b\n\n\nc\n", encoding="utf-8")
    assert read_all(open_corpus([str(tmp_path)], CorpusOptions(txt_documents=documents))) == expected


def test_folders_are_searched_in_order_without_hidden_or_other_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/.hidden.txt", "a/README.md", ".git/x.txt"):
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
    monkeypatch.setattr("fat5.data.corpus.SMALLEST_CHUNK", 100)
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
    "short-csv-row": ("a.csv", lambda p: p.write_text("id,text\n1,a\n2\n"), r"a\.csv:3: a row without"),
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz"])
def test_a_line_that_never_ends_is_refused_before_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LARGEST_DOCUMENT", 1 << 20)
    content = b"text\n" + b"a" * (3 << 20)
    (tmp_path / name).write_bytes(
        gzip.compress(content, 1) if name.endswith("gz") else content[5:] if name != "a.csv" else content
    )
    with pytest.raises(DataError, match=r"a\.[a-z.]+:\d: (a line longer than 1 MiB|not JSON)"):
        read_all(open_corpus([str(tmp_path / name)]))


def test_a_paragraph_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_DOCUMENT", 1000)
    (tmp_path / "a.txt").write_text("une ligne\n" * 200)
    with pytest.raises(DataError, match=r"a\.txt:101: a paragraph longer.*txt_documents line"):
        read_all(open_corpus([str(tmp_path)]))


def test_the_line_of_a_fault_is_counted_from_the_top_of_a_cut_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fat5.data.corpus.SMALLEST_CHUNK", 64)
    lines = ['{"text": "good"}'] * 100
    lines[70] = "{bad"
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:71: not JSON"):
        read_all(open_corpus([str(tmp_path)]))


@pytest.mark.parametrize(
    ("given_name", "said"),
    [
        ("missing.txt", r"missing\.txt: no such file or folder"),
        ("thesis.docx", r"thesis\.docx: unknown extension.*\.txt, \.jsonl"),
        ("folder", "no text files in this folder"),
        ("hf:/nowhere/at-all", "cannot be opened"),
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
