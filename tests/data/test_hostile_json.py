"""JSON of a prepared folder with values of other types: one line, whatever the value. (Checkpoints: tests/faults.)"""

import copy
import json
import math
import shutil

import numpy as np
import pytest
from preparing import config, write_jsonl

from fat5.data import load_tokenizer, open_shards
from fat5.data.shards.plan import read_plan
from fat5.data.shards.prepare import prepare
from fat5.data.shards.token_shards import verify
from fat5.data.tokenizer.json_file import byte_tokenizer
from fat5.errors import DataError, FAT5Error
from fat5.files import file_sha256

ODD = [None, True, -5, 10**30, 1.5, math.nan, "x", [], {}, [[]], {"x": {}}, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("hostile")
    prepare(config(path, tokenizer, write_jsonl(path / "a.jsonl", ["un deux trois"] * 40), validation_fraction=0.1))
    return path / "out"


def places(content, path=()):
    for key, value in content.items() if isinstance(content, dict) else enumerate(content[:2]):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def refusals(file, content, use, most=10**6):
    """How many documents with one value replaced (or removed) `use` refuses; any other error passes through."""
    refused = 0
    for path in list(places(content))[:most]:
        for odd in ODD:
            changed = inner = copy.deepcopy(content)
            for key in path[:-1]:
                inner = inner[key]
            if odd is ...:
                del inner[path[-1]]
            else:
                inner[path[-1]] = odd
            file.write_text(json.dumps(changed))
            try:
                use()
            except FAT5Error:
                refused += 1
    return refused


def test_manifest(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")

    def use():
        for split in ("train", "validation"):
            shards = open_shards(tmp_path / "data", split)
            list(shards), shards.manifest.to_json()
        verify(tmp_path / "data")

    file = tmp_path / "data" / "manifest.json"
    assert refusals(file, json.loads(file.read_text()), use) > 100
    file.write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match="damaged"):
        use()


def test_an_index_with_its_hash_made_anew(folder, tmp_path):
    """Ends beyond the shard, or that go back, would be read by compiled code."""
    shutil.copytree(folder, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    entry = manifest["shards"]["train"][0]
    index = tmp_path / "data" / f"{entry['file']}.index"
    ends = np.fromfile(index, "<u8")
    for place, end in ((-1, ends[-1] + 1), (0, ends[-1] + 5), (1, 0)):
        changed = ends.copy()
        changed[place] = end
        changed.tofile(index)
        entry["index_sha256"] = file_sha256(index)
        (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="does not divide its shard into documents"):
            open_shards(tmp_path / "data").document(0)


def test_plan(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    file = tmp_path / "data" / "logs" / "plan.json"

    def use():
        plan = read_plan(tmp_path / "data")
        return plan.bytes, plan.options, plan.deduplicated

    assert refusals(file, json.loads(file.read_text()), use) > 20


def test_what_a_task_left(folder, tmp_path, tokenizer):
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    file = next((tmp_path / "out" / "logs" / "shards").glob("*.json"))
    content = json.loads(file.read_text())
    content["train"]["tokens"] = "many"
    for text in ("[]", "[" * 100_000, json.dumps(content)):
        file.write_text(text)
        with pytest.raises(DataError, match=rf"{file.name}: damaged\. Remove the whole folder"):
            prepare(config(tmp_path, tokenizer, folder.parent / "a.jsonl", validation_fraction=0.1))


def test_tokenizer(tmp_path):
    file = tmp_path / "tokenizer.json"
    content = byte_tokenizer()
    content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:20])
    content["added_tokens"] = content["added_tokens"][:6]

    def use():
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode([1, 2, 900])

    assert refusals(file, content, use) > 100
    file.write_bytes(b"[" * 100_000)
    with pytest.raises(FAT5Error, match="not JSON"):
        use()
