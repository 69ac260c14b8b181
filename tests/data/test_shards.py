"""Token shards: reading, and fault 6 (a flipped byte, a truncation, a missing file)."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from fat5.data import open_shards, read_manifest, verify
from fat5.data.shards.token_shards import Manifest, ShardEntry, TokenShards
from fat5.errors import DataError


def write_shard(folder: Path, name: str, documents: list[list[int]], dtype: str = "<u2") -> ShardEntry:
    tokens = np.array([token for document in documents for token in document], dtype)
    ends = np.cumsum([len(document) for document in documents]).astype("<u8")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokens.tobytes())
    path.with_name(path.name + ".index").write_bytes(ends.tobytes())
    hashes = [hashlib.sha256(array.tobytes()).hexdigest() for array in (tokens, ends)]
    return ShardEntry(name, len(documents), len(tokens), tokens.nbytes, *hashes)


DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10], [], [11, 12, 13, 14]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    entries = [write_shard(tmp_path, f"train/{rank:05d}.ds", documents) for rank, documents in enumerate(DOCUMENTS)]
    manifest = Manifest("made", "0" * 64, 256, 2, 0.0, {"train": entries, "validation": []})
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_reads_every_document(folder: Path) -> None:
    shards = open_shards(folder)
    expected = [document for documents in DOCUMENTS for document in documents]
    assert (len(shards.entries), shards.num_documents, shards.num_tokens) == (2, 5, 10)
    assert [document.tolist() for document in shards] == expected
    assert [shards.document(index).tolist() for index in range(5)] == expected
    assert list(map(len, shards)) == [3, 1, 2, 0, 4]
    assert open_shards(folder, "validation").num_documents == 0


def test_documents_are_read_only_views_of_the_map(folder: Path) -> None:
    document = open_shards(folder).document(0)
    assert not document.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        document[0] = 1


def test_wide_vocabularies_are_uint32(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, "train/00000.ds", [[250_000, 3]], "<u4")
    (tmp_path / "manifest.json").write_text(Manifest("m", "0" * 64, 250_112, 4, 0.0, {"train": [entry]}).to_json())
    document = open_shards(tmp_path).document(0)
    assert (document.dtype, document.tolist()) == (np.dtype("<u4"), [250_000, 3])


def test_workers_get_the_names_and_not_the_maps(folder: Path) -> None:
    shards = open_shards(folder)
    shards.document(0)
    copy: TokenShards = pickle.loads(pickle.dumps(shards))
    assert copy._maps == {}
    assert copy.document(1).tolist() == [8]


def test_a_flipped_byte_is_named_at_first_read_only(folder: Path) -> None:
    flip(folder / "train" / "00001.ds", 5)
    shards = open_shards(folder)
    assert shards.document(1).tolist() == [8]
    with pytest.raises(DataError, match=r"00001\.ds: shard is damaged"):
        shards.document(2)
    with pytest.raises(DataError, match=r"00001\.ds: shard is damaged"):
        verify(folder)


def test_a_flipped_byte_in_an_index_is_named(folder: Path) -> None:
    flip(folder / "train" / "00000.ds.index", 0)
    with pytest.raises(DataError, match=r"00000\.ds\.index: shard is damaged"):
        open_shards(folder).shard_ends(0)


@pytest.mark.parametrize("name", ["00001.ds", "00001.ds.index"])
def test_a_truncation_is_named_at_opening(folder: Path, name: str) -> None:
    path = folder / "train" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{name}: shard has"):
        open_shards(folder)


@pytest.mark.parametrize("name", ["00000.ds", "00000.ds.index"])
def test_a_missing_file_is_named_at_opening(folder: Path, name: str) -> None:
    (folder / "train" / name).unlink()
    with pytest.raises(DataError, match=f"{name}: shard is missing"):
        open_shards(folder)


def test_hashes_are_checked_once_for_a_file_that_does_not_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_shards(folder).document(0)
    hashed: list[str] = []
    monkeypatch.setattr("fat5.data.shards.token_shards.file_sha256", lambda path: hashed.append(path.name) or "wrong")
    open_shards(folder).document(0)
    assert hashed == []
    flip(folder / "train" / "00000.ds", 0)
    with pytest.raises(DataError, match="damaged"):
        open_shards(folder).document(0)
    assert hashed == ["00000.ds"]
    with pytest.raises(DataError, match="damaged"):
        verify(folder)


def test_a_token_beyond_the_vocabulary_is_named_at_first_read_every_time(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 256', '"vocab_size": 14'))
    assert open_shards(folder).shard_tokens(0).max() == 8
    for read in (
        lambda: open_shards(folder).shard_tokens(1),
        lambda: list(open_shards(folder)),
        lambda: verify(folder),
    ):
        with pytest.raises(DataError, match=r"00001\.ds: shard holds token 14, and its manifest's vocabulary is 14"):
            read()


def test_verify_passes_on_good_shards(folder: Path) -> None:
    assert verify(folder) == read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(version=99), "version 99"),
        (lambda content: content.update(format="other"), "not a manifest"),
        (lambda content: content.pop("token_bytes"), "not a manifest"),
        (lambda content: content["shards"]["train"][0].update(file="../../etc/passwd"), "not a manifest"),
        (lambda content: content["shards"]["train"][0].update(tokens=3), "contradicts itself"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(folder: Path, change: object, said: str) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        open_shards(folder)


def test_a_manifest_with_a_key_twice_is_refused_and_one_of_before_bad_rows_is_read(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace(' "bad_rows": 0,\n', ""))
    assert "bad_rows" not in path.read_text()
    assert read_manifest(folder).bad_rows == 0
    path.write_text(text.replace('"shards": {', '"shards": {}, "shards": {'))
    with pytest.raises(DataError, match="not a manifest"):
        read_manifest(folder)


def test_what_is_no_prepared_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        open_shards(tmp_path / "nowhere")
    (folder / "manifest.json").write_bytes(pickle.dumps({"format": "fat5-shards"}))
    with pytest.raises(DataError, match="not a manifest"):
        open_shards(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="not a manifest"):
        open_shards(folder)
    (folder / "manifest.json").write_text(Manifest("m", "0", 256, 2, 0.0, {"train": []}).to_json())
    with pytest.raises(DataError, match="no split"):
        open_shards(folder, "test")
