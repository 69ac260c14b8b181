"""Reading examples: each form of file gives the same rows, damage is refused by file and row, and splits are stable."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import random
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from fat5.errors import ConfigurationError, DataError
from fat5.tasks.finetune import reading
from fat5.tasks.finetune.table import MOST_PARTS, Table, hold_out, read_table

zstandard = pytest.importorskip("zstandard")

ROWS = [{"source": 'un "mot", deux', "target": "a\nb"}, {"source": "é ½ \U0001f600", "target": " x "}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'source,target\n"un ""mot"", deux","a\nb"\né ½ \U0001f600, x \n'
PACKERS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Le noyau.",
                    "qas": [
                        {"id": "1", "question": "Quoi ?", "answers": [{"text": "noyau", "answer_start": 3}]},
                        {"id": "2", "question": "Qui ?", "is_impossible": True, "answers": []},
                    ],
                }
            ],
        }
    ],
}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return str(path)


def rows_of(*paths, **options):
    return read_table(paths, "train", **options).rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\ufeff\n" + LINES.replace("\n", "\r\n\n")),
        ("a.json", LINES),
        ("a.JSON", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.csv", CSV),
        ("a.csv", "\ufeff\n" + CSV),
        ("a.tsv", CSV.replace(",", "\t").replace('""\t deux', '"", deux')),
    ],
)
def test_every_form_gives_the_same_rows(tmp_path, name, content):
    assert rows_of(write(tmp_path, name, content)) == ROWS
    for codec, pack in PACKERS.items():
        assert rows_of(write(tmp_path, name + codec, pack(content.encode()))) == ROWS


def test_parquet_and_nested_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert rows_of(str(tmp_path / "a.parquet")) == ROWS
    nested = [{"translation": {"fr": "a", "en": None}}, {"translation": {"fr": "b", "en": "c"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), tmp_path / "b.parquet")
    table = read_table([str(tmp_path / "b.parquet")], "train")
    assert table.texts("translation.fr") == ["a", "b"]
    assert table.texts("translation.en", required=False) == ["", "c"]
    dotted = Table()
    dotted.rows, dotted.files, dotted.file, dotted.number = [{"a.b": "x", "a": {"b": "y"}}], ["f"], [0], [1]
    assert dotted.texts("a.b") == ["x"]  # a column of that very name comes first


@pytest.mark.parametrize("indent", [None, 1])
def test_squad_becomes_a_row_a_question(tmp_path, indent):
    assert rows_of(write(tmp_path, "dev.json", json.dumps(SQUAD, indent=indent))) == [
        {"id": "1", "question": "Quoi ?", "context": "Le noyau.", "answers": {"text": ["noyau"], "answer_start": [3]}},
        {"id": "2", "question": "Qui ?", "context": "Le noyau.", "answers": {"text": [], "answer_start": []}},
    ]


def test_a_json_document_may_be_longer_than_a_line_may(tmp_path, monkeypatch):
    monkeypatch.setattr("fat5.data.text.rows.LARGEST_DOCUMENT", 100)
    rows = [{"source": "a" * 60, "target": "b"}] * 3
    assert rows_of(write(tmp_path, "a.json", json.dumps(rows))) == rows
    with pytest.raises(DataError, match="a line longer than"):
        rows_of(write(tmp_path, "a.jsonl", json.dumps({"source": "a" * 200})))
    monkeypatch.setattr(reading, "LARGEST_JSON", 150)
    with pytest.raises(DataError, match="a JSON document above"):
        rows_of(write(tmp_path, "a.json", json.dumps(rows)))


def test_a_folder_of_several_forms(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, "b.jsonl", LINES)
    write(tmp_path, "deep/a.csv", CSV)
    write(tmp_path, "README.md", "text")
    write(tmp_path, ".hidden.jsonl", "{")
    write(tmp_path, "dataset_info.json", "{}")
    table = read_table([str(tmp_path)], "train", limit=3)
    assert table.rows == [*ROWS, ROWS[0]]
    assert [table.where(index) for index in range(3)] == [
        f"{tmp_path}/b.jsonl, row 1", f"{tmp_path}/b.jsonl, row 2", f"{tmp_path}/deep/a.csv, row 1",
    ]  # fmt: skip
    write(tmp_path, "c.ndjson", LINES)
    with pytest.raises(DataError, match=r"c\.ndjson: a form of data that is not read"):
        rows_of(str(tmp_path))


def test_a_limit_reads_no_further(tmp_path):
    good, bad = write(tmp_path, "a.jsonl", LINES + "{damaged\n"), write(tmp_path, "b.jsonl", "{damaged\n")
    assert rows_of(good, bad, limit=2) == ROWS


def test_rows_of_many_files_share_the_last_part(tmp_path):
    names = [write(tmp_path, f"{index:03}.jsonl", '{"a": 1}') for index in range(MOST_PARTS + 30)]
    table = read_table(names, "train")
    assert len(table.part_names) == MOST_PARTS
    assert table.part_names[-1] == "31 other files"
    assert table.parts == [*range(MOST_PARTS), *[MOST_PARTS - 1] * 30]
    assert read_table(names[:MOST_PARTS], "train").part_names == names[:MOST_PARTS]


DAMAGED = {
    "empty": ("a.jsonl", b"", "this file is empty"),
    "blank": ("a.jsonl", b"\n \n", "no examples"),
    "header": ("a.csv", b"source,target\n", "no examples"),
    "binary": ("a.jsonl", b"\x07\x00\x01", "binary data"),
    "utf16": ("a.csv", "source".encode("utf-16"), "UTF-16 text"),
    "pickle": ("a.pkl", pickle.dumps(ROWS), "may be a pickle, which FAT5 never loads"),
    "torch": ("a.pt", b"PK\x03\x04", "may be a pickle, which FAT5 never loads"),
    "renamed": ("a.jsonl", pickle.dumps(ROWS), "but a pickle, which FAT5 never loads"),
    "text": ("a.txt", b"a", r"the form \.txt is not read"),
    "bare": ("a", b"a", "the form without an ending is not read"),
    "damaged": ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON"),
    "array": ("a.jsonl", b'[{"a": 1}]', r"a\.jsonl:1: an array, .* ends in \.json"),
    "list": ("a.json", b"[[1]]", "row 1: no object of columns"),
    "number": ("a.json", b"5", "no list of rows"),
    "deep": ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "deep json": ("a.json", b"[" * 100_000, "nested too deeply"),
    "twice": ("a.jsonl", b'{"a": 1, "a": 2}', "key 'a' stands twice"),
    "surrogate": ("a.jsonl", b'{"a": "\\ud800"}', "half of a surrogate pair"),
    "latin1": ("a.jsonl", '{"a": "é"}'.encode("latin1"), "invalid UTF-8"),
    "latin1 json": ("a.json", '[{"a": "é"}]'.encode("latin1"), "invalid UTF-8"),
    "paragraphs": ("a.json", b'{"data": [{"paragraphs": [5]}]}', "has no list of objects 'paragraphs'"),
    "article": ("a.json", b'{"data": [5, {"paragraphs": []}]}', "has no list of objects 'paragraphs'"),
    "short row": ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3: fields in this row: 1, in the header: 2"),
    "long row": ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2: fields in this row: 3"),
    "quotes": ("a.csv", b'a,b\n"1"2,3\n', r"a\.csv:2: not CSV"),
    "open quote": ("a.csv", b'a,b\n"1,2\n3,4\n', "not CSV"),
    "semicolons": ("a.csv", b"a;b\n1;2\n", "';' stands between values in place of ','"),
    "two columns": ("a.csv", b"a,a\n1,2\n", "column 'a' stands twice"),
    "nul": ("a.csv", b"a,b\n\x00,1\n", "binary data"),
    "no gzip": ("a.jsonl.gz", b"hello", "is not .jsonl.gz but something else"),
    "no parquet": ("a.parquet", b"hello", "is not .parquet but something else"),
    "parquet": ("a.parquet", b"PAR1" + b"x" * 99, "Parquet data is damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_hostile_files_are_refused(tmp_path, name):
    file, content, message = DAMAGED[name]
    with pytest.raises(DataError, match=message) as caught:
        rows_of(write(tmp_path, file, content))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("codec", PACKERS)
def test_compressed_files_that_are_cut_or_damaged_are_refused(tmp_path, form, codec):
    content = random.Random(0).randbytes(3000).hex()
    row = {".jsonl": '{"a": "%s"}', ".json": '[{"a": "%s"}]', ".csv": 'a\n"%s"\n'}[form] % content
    packed = PACKERS[codec](row.encode())
    middle = len(packed) // 2
    for wrong in (packed[:-9], packed[:middle] + b"\xff" * 40 + packed[middle + 40 :]):
        with pytest.raises(DataError, match=r"damaged|cannot be read|invalid UTF-8|not JSON|not CSV"):
            rows_of(write(tmp_path, f"a{form}{codec}", wrong))


def test_other_sources_that_cannot_be_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(1))
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in {
        str(tmp_path / "a.jsonl"): "but a zip archive|but a pickle",
        str(tmp_path / "empty"): "no examples in this folder",
        str(tmp_path / "pipe.jsonl"): "is no regular file",
        str(tmp_path / "absent.jsonl"): "no such file or folder",
        "absent/a.tsv": "no such file or folder",
        "nobody/nothing": "split train of this dataset cannot be opened",
    }.items():
        with pytest.raises(DataError, match=message):
            rows_of(name)


def test_classes_of_a_dataset_appear_by_name(monkeypatch):
    import datasets

    classes = datasets.ClassLabel(names=["O", "B-X"])
    kinds = {
        "label": classes,
        "tags": datasets.List(classes),
        "deep": {"label": classes},
        "text": datasets.Value("string"),
    }
    columns = {"label": [1, -1], "tags": [[0, 1], []], "deep": [{"label": 0}, {"label": 1}], "text": ["a", None]}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or made)
    assert rows_of("hf:some/set", subset="fr") == [
        {"label": "B-X", "tags": ["O", "B-X"], "deep": {"label": "O"}, "text": "a"},
        {"label": -1, "tags": [], "deep": {"label": "B-X"}, "text": None},
    ]
    assert asked == [(("some/set", "fr"), {"split": "train"})]


def test_a_row_of_csv_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("fat5.data.text.formats.LARGEST_DOCUMENT", 1000)
    rows = "a,b\n" + '"x\ny",1\n' * 400
    assert len(rows_of(write(tmp_path, "a.csv", rows))) == 400
    with pytest.raises(DataError, match="a row longer than"):
        rows_of(write(tmp_path, "a.csv", 'a,b\n"' + "x\n" * 600 + '",1\n'))


@pytest.mark.parametrize(
    ("name", "near"),
    [("sorce", "source"), ("SOURCE", "source"), ("fr", "pair.fr"), ("pair.fra", "pair.fr"), ("pair.fr.x", "pair.fr")],
)
def test_a_wrong_column_names_the_close_ones(tmp_path, name, near):
    table = read_table([write(tmp_path, "a.jsonl", '{"source": "a", "pair": {"fr": "a", "en": "b"}}')], "train")
    with pytest.raises(
        DataError, match=rf"row 1: no column '{name}'; it has source, pair, pair\.fr, .*Did you mean {near}"
    ):
        table.texts(name)
    with pytest.raises(DataError, match=r"'pair' is nested\. Name one of pair\.fr, pair\.en"):
        table.texts("pair")


def test_splits_keep_equal_keys_together_and_are_stable():
    table = Table()
    table.rows = [{"key": f"k{index % 200}", "place": index} for index in range(1000)]
    table.files, table.file, table.number = ["f"], [0] * 1000, list(range(1, 1001))
    keys = table.texts("key")
    train, held = hold_out(table, keys, 0.2)
    assert len(train) + len(held) == 1000
    assert not set(train.texts("key")) & set(held.texts("key"))
    assert 0.1 < len(held) / 1000 < 0.3
    for some in (train, held):  # the order of the file, and each row's own number
        places = some.column("place")
        assert places == sorted(places)
        assert some.number == [place + 1 for place in places]
    larger = hold_out(table, keys, 0.4)[1]
    assert set(held.texts("key")) < set(larger.texts("key"))
    part = table.select(range(500, 520))  # other rows do not matter
    expected = set(part.texts("key")) & set(held.texts("key"))
    assert set(hold_out(part, part.texts("key"), 0.2)[1].texts("key")) == expected
    assert sorted(set(held.texts("key")))[:3] == ["k105", "k107", "k110"]  # by xxHash of the key alone


@pytest.mark.parametrize(("count", "same"), [(1, False), (50, True)])
def test_a_table_of_one_input_cannot_be_split(count, same):
    table = Table()
    table.rows, table.files, table.file = [{"a": "x"}] * count, ["f"], [0] * count
    with pytest.raises(ConfigurationError, match=rf"{count} examples with 1 different inputs leaves \w+ empty"):
        hold_out(table, ["x"] * count, 0.5)


def test_the_hash_of_a_table_tells_every_value():
    def hash_of(rows):
        table = Table()
        table.rows = rows
        return table.sha256()

    assert hash_of([{"a": 1, "b": "é"}]) == hash_of([{"b": "é", "a": 1}])
    others = [[{"a": 1, "b": "e"}], [{"a": "1", "b": "é"}], [{"a": 1}, {"b": "é"}], []]
    assert len({hash_of(rows) for rows in [[{"a": 1, "b": "é"}], *others]}) == 5
