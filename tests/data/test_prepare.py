"""Preparing a corpus: the same shards whoever runs it, restart after a kill, refusals."""

import contextlib
import gzip
import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from preparing import config, decoded, die, manifest, write_jsonl
from transformers import AutoTokenizer

from fat5.data import Tokenizer, load_tokenizer, open_shards, read_manifest, verify
from fat5.data.shards.plan import read_plan
from fat5.data.shards.prepare import prepare
from fat5.data.text.rows import CorpusOptions
from fat5.data.tokenizer.json_file import byte_tokenizer
from fat5.errors import ConfigurationError, DataError, RunDirectoryError, TokenizerError
from made_run import prepare_sample
from made_tokenizers import KINDS, sentencepiece


def test_nothing_is_lost_and_nothing_added(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [*texts, "", "un </s> <extra_id_0> [S] deux"])
    made = prepare(config(tmp_path, tokenizer, corpus, validation_fraction=0.2))
    train, validation = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "validation")
    assert sorted(train + validation) == sorted([*texts, "un </s> <extra_id_0> [S] deux"])
    # Order is kept in each split.
    assert [text for text in texts if text in set(train)] == [text for text in train if "</s>" not in text]
    assert 0.1 < len(validation) / len(texts) < 0.3
    info = load_tokenizer(tokenizer).info
    special = {info.pad_id, info.eos_id, info.unk_id, *info.sentinel_ids, *info.mode_ids.values()}
    tokens = np.concatenate(list(open_shards(tmp_path / "out")))
    assert not special & set(tokens.tolist())
    assert made
    assert made.tokenizer_sha256 == info.sha256 == load_tokenizer(tmp_path / "out" / "tokenizer").info.sha256
    verify(tmp_path / "out")


def test_datatrove_reads_the_shards(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    from datatrove.utils.dataset import DatatroveFileDataset

    prepare(config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", texts), validation_fraction=0.0))
    shards = open_shards(tmp_path / "out")
    tokens = np.concatenate(list(shards))
    path = str(tmp_path / "out" / shards.entries[0].file)
    theirs = DatatroveFileDataset(path, 32, token_size=2)
    assert np.array_equal(theirs[0]["input_ids"].numpy(), tokens[:33].astype(np.int64))


def test_the_shards_that_tests_train_on_are_those_of_prepare(tmp_path: Path) -> None:
    made = prepare_sample(tmp_path)
    prepare(config(tmp_path, str(tmp_path / "tokenizer"), tmp_path / "corpus.jsonl", validation_fraction=0.1))
    theirs = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and "logs" not in path.parts]
    assert len(theirs) > 6
    for path in theirs:
        assert (made / path.relative_to(tmp_path / "out")).read_bytes() == path.read_bytes(), path


@pytest.mark.usefixtures("small_tasks")
def test_workers_and_runs_do_not_change_a_byte(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    for name, workers in (("one", 1), ("again", 1), ("three", 3)):
        prepare(replace(config(tmp_path, tokenizer, corpus), output_dir=str(tmp_path / name), workers=workers))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.ds*"))
    assert len(files) > 10
    for name in ("again", "three"):
        assert manifest(tmp_path / name) == manifest(tmp_path / "one")
        assert all((tmp_path / name / file).read_bytes() == (tmp_path / "one" / file).read_bytes() for file in files)


def test_more_data_moves_no_document_to_the_other_split(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    held_out = []
    for name, part in (("half", texts[:200]), ("all", texts)):
        corpus = write_jsonl(tmp_path / f"{name}.jsonl", part)
        keys = config(tmp_path, tokenizer, corpus, validation_fraction=0.1)
        prepare(replace(keys, output_dir=str(tmp_path / name)))
        held_out.append(set(decoded(tmp_path / name, "validation")))
    assert held_out[0] == held_out[1] & set(texts[:200])
    assert held_out[0]


def test_several_files_and_forms_are_one_corpus(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts[:10])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "b", texts[10:20]).read_bytes()))
    (folder / "c.txt").write_text("\n\n".join(texts[20:30]), encoding="utf-8")
    made = prepare(config(tmp_path, tokenizer, folder, validation_fraction=0.0, name="mine"))
    assert decoded(tmp_path / "out", "train") == texts[:30]
    assert made
    assert made.name == "mine"


def test_a_wide_vocabulary_is_written_as_uint32(tmp_path: Path, texts: list[str]) -> None:
    content = byte_tokenizer()
    content["model"]["vocab"] |= {f"piece{index}": 400 + index for index in range(70_000)}
    wide = Tokenizer(content, None, {}).save(tmp_path / "wide")
    made = prepare(config(tmp_path, str(wide), write_jsonl(tmp_path / "a.jsonl", texts[:20]), validation_fraction=0.0))
    assert made
    assert made.token_bytes == 4
    shards = open_shards(tmp_path / "out")
    assert shards.document(0).dtype == np.dtype("<u4")
    assert shards.document(0).tolist() == [byte + 3 for byte in texts[0].encode()]
    assert decoded(tmp_path / "out", "train") == texts[:20]


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("kind", KINDS)
def test_unknown_tokens_are_counted_whatever_the_tokenizer(tmp_path: Path, kind: str) -> None:
    own = KINDS[kind](tmp_path / "t")
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"le noyau 日本, un paquet{' de' * i}" for i in range(150)])
    made = prepare(config(tmp_path, str(own), corpus, validation_fraction=0.3))
    assert made
    unk, each = load_tokenizer(own).info.unk_id, {"sentencepiece": 1, "word_piece": 2}.get(kind, 0)
    total = 0
    for split in ("train", "validation"):
        written = np.concatenate(list(open_shards(tmp_path / "out", split)))
        assert made.unknown(split) == int((written == unk).sum())
        assert json.loads(manifest(tmp_path / "out"))["splits"][split]["unknown"] == made.unknown(split)
        total += int((written == unk).sum())
    assert total == 150 * each
    assert load_tokenizer(tmp_path / "out" / "tokenizer").info == load_tokenizer(own).info


def test_tokens_that_a_user_added_are_written(tmp_path: Path) -> None:
    own = sentencepiece(tmp_path / "t", ["\n", "{"])
    made = prepare(
        config(tmp_path, str(own), write_jsonl(tmp_path / "a.jsonl", ["le\nun { noyau"]), validation_fraction=0.0)
    )
    assert made
    assert made.unknown("train") == 0
    stock = AutoTokenizer.from_pretrained(own)("le\nun { noyau", add_special_tokens=False).input_ids
    assert open_shards(tmp_path / "out").document(0).tolist() == stock


def test_a_manifest_of_before_does_not_say_how_many_are_unknown(tmp_path: Path, tokenizer: str) -> None:
    made = prepare(config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", ["un"]), validation_fraction=0.0))
    assert made
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_bytes())
    for entry in content["shards"]["train"]:
        del entry["unknown"]
    path.write_text(json.dumps(content))
    assert verify(tmp_path / "out").unknown("train") is None


def test_a_hugging_face_dataset_is_streamed(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    (tmp_path / "dataset").mkdir()
    for part in range(2):
        write_jsonl(tmp_path / "dataset" / f"train-{part}.jsonl", texts[part * 20 : part * 20 + 20])
    prepare(config(tmp_path, tokenizer, f"hf:{tmp_path / 'dataset'}", validation_fraction=0.0))
    assert sorted(decoded(tmp_path / "out", "train")) == sorted(texts[:40])


def test_a_hugging_face_dataset_is_read_as_strictly_as_files(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    (tmp_path / "dataset").mkdir()
    rows = [{"translation": {"fr": text}, "media": "a column of that name"} for text in [*texts[:20], None]]
    path = tmp_path / "dataset" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = CorpusOptions(text_column="translation.fr")
    keys = config(tmp_path, tokenizer, f"hf:{path.parent}", validation_fraction=0.0, corpus=options)
    prepare(keys)
    assert decoded(tmp_path / "out", "train") == texts[:20]
    numbers = {"text": 5}
    path.write_text("".join(json.dumps(row) + "\n" for row in [numbers, numbers]))
    keys = replace(keys, output_dir=str(tmp_path / "numbers"), corpus=CorpusOptions(on_bad_row="skip"))
    with pytest.raises(DataError, match=r"Rows skipped: 2; the first: .*holds int, not text"):
        prepare(keys)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_tasks")
def test_skipped_rows_are_counted_in_the_manifest(
    tmp_path: Path, tokenizer: str, texts: list[str], workers: int
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    rows = corpus.read_bytes().splitlines(keepends=True)
    for index in (3, 200, 399):
        rows[index] = b'{"text": "cut\n'
    corpus.write_bytes(b"".join(rows))
    keys = config(tmp_path, tokenizer, corpus, workers=workers, validation_fraction=0.0)
    made = prepare(replace(keys, corpus=CorpusOptions(on_bad_row="skip")))
    assert made
    assert made.bad_rows == read_manifest(tmp_path / "out").bad_rows == 3
    assert decoded(tmp_path / "out", "train") == [text for i, text in enumerate(texts) if i not in (3, 200, 399)]
    first = json.loads((tmp_path / "out" / "logs" / "bad_rows" / "00000.json").read_bytes())["first"]
    assert first.startswith(f"{corpus}:4: not JSON")
    assert len(read_plan(tmp_path / "out").tasks) > 3


# Restart

KILLED = """
import sys, time
import fat5.data.text.corpus as corpus, fat5.data.shards.pipeline as pipeline
from fat5.data.shards.prepare import PrepareConfig, prepare
corpus.SMALLEST_CHUNK = 16_000
encode = pipeline.Tokenizer.encode_documents
def slow(self, texts):
    time.sleep(0.15)
    return encode(self, texts)
pipeline.Tokenizer.encode_documents = slow
prepare(PrepareConfig([sys.argv[1]], sys.argv[2], sys.argv[3], workers=1))
"""


@pytest.mark.usefixtures("small_tasks")
def test_killed_and_run_again_the_manifest_is_the_same(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(replace(config(tmp_path, tokenizer, corpus), output_dir=str(tmp_path / "clean")))
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(corpus), tokenizer, str(out)])
    done: list[Path] = []
    deadline = time.monotonic() + 60
    while len(done) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        done = finished_tasks(out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = finished_tasks(out)
    assert 2 <= len(done) < len(read_plan(out).tasks)
    with pytest.raises(DataError, match="Run `fat5 prepare` again"):
        open_shards(out)
    stamps = {path: path.stat().st_mtime_ns for path in done}
    (out / "train" / ".00009.ds.123.partial").write_bytes(b"left by the killed process")
    prepare(config(tmp_path, tokenizer, corpus))
    assert manifest(out) == manifest(tmp_path / "clean")
    assert {path: path.stat().st_mtime_ns for path in done} == stamps, "finished tasks were done again"
    assert not list(out.rglob("*.partial"))
    verify(out)


def finished_tasks(out: Path) -> list[Path]:
    """What the tasks that are marked as finished left; a killed task may have left its own as well."""
    marks = sorted((out / "logs" / "tokens" / "completions").glob("*"))
    return [out / "logs" / "shards" / f"{mark.name}.json" for mark in marks]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_processes_do_not_outlive_the_one_that_started_them(tmp_path: Path, tokenizer: str, sent: int) -> None:
    for part in range(2):
        write_jsonl(tmp_path / f"{part}.jsonl", ["un deux trois quatre cinq " * 20] * 20_000)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fat5", "prepare", str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")]
    process = subprocess.Popen([*command, "--tokenizer", tokenizer, "--output_dir", str(out), "--workers", "2"])
    deadline = time.monotonic() + 120
    while len(list((out / "logs" / "progress").glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = descendants(process.pid)
    assert len(children) >= 2
    process.send_signal(sent)
    assert process.wait(60) == (-signal.SIGKILL if sent == signal.SIGKILL else 130)
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert not (out / "manifest.json").exists()


def descendants(pid: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    for _ in range(4):
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def test_run_again_when_complete_it_does_nothing(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    keys = config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", texts[:50]))
    first = prepare(keys)
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare(keys) == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    next((tmp_path / "out" / "train").glob("*.ds")).unlink()
    with pytest.raises(DataError, match="shard is missing"):
        prepare(keys)


def test_a_dead_worker_is_an_error_and_not_a_wait(
    tmp_path: Path, tokenizer: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fat5.data.text.corpus.SMALLEST_CHUNK", 16_000)
    monkeypatch.setattr("fat5.data.shards.executors.run_task", die)
    with pytest.raises(DataError, match="a worker process died"):
        prepare(config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", texts), workers=2))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"validation_fraction": 0.5}, "another validation_fraction"),
        ({"steps": ["pii"]}, "other steps"),
        ({"name": "b"}, "another name"),
    ],
)
def test_a_folder_begun_otherwise_is_refused(
    tmp_path: Path, tokenizer: str, texts: list[str], keys: dict, said: str
) -> None:
    first = config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", texts[:20]))
    prepare(first)
    before = manifest(tmp_path / "out")
    with pytest.raises(RunDirectoryError, match=f"was begun with {said}"):
        prepare(replace(first, **keys))
    assert manifest(tmp_path / "out") == before


def test_changed_files_are_refused(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    keys = config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", texts[:20]))
    prepare(keys)
    write_jsonl(tmp_path / "a.jsonl", texts[:21])
    with pytest.raises(RunDirectoryError, match="the files have changed"):
        prepare(keys)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", texts[:5])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds something else"):
        prepare(config(tmp_path, tokenizer, corpus))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(RunDirectoryError, match="is a file"):
        prepare(replace(config(tmp_path, tokenizer, corpus), output_dir=str(corpus)))


def test_two_preparations_of_one_folder_are_refused(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    import fcntl

    keys = config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", texts[:5]))
    (tmp_path / "out" / "logs").mkdir(parents=True)
    with (tmp_path / "out" / "logs" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunDirectoryError, match="another process"):
            prepare(keys)
    prepare(keys)


# Bad input leaves nothing behind


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: invalid UTF-8"),
        (b'{"text": ""}\n{"text": null}\n', "no text in this corpus"),
        (b'{"content": "a"}\n', "no column 'text'; it has content"),
        (b"", "empty"),
        (pickle.dumps({"text": "a"}), "a pickle, which FAT5 never loads"),
    ],
    ids=["not-json", "invalid-utf8", "empty-texts", "wrong-column", "empty", "pickle"],
)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_tasks")
def test_bad_input_leaves_nothing(tmp_path: Path, tokenizer: str, content: bytes, said: str, workers: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        prepare(config(tmp_path, tokenizer, tmp_path / "a.jsonl", workers=workers))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_fault_in_a_worker_is_the_same_one_line(
    tmp_path: Path, tokenizer: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fat5.data.text.corpus.SMALLEST_CHUNK", 4_000)
    corpus = write_jsonl(tmp_path / "a.jsonl", texts[:100])
    with corpus.open("ab") as file:
        file.write(b"{bad\n")
    with pytest.raises(DataError, match=r"a\.jsonl:101: not JSON"):
        prepare(config(tmp_path, tokenizer, corpus, workers=2))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        ({"validation_fraction": 1.0}, ConfigurationError, "validation_fraction"),
        ({"workers": -1}, ConfigurationError, "workers"),
        ({"tokenizer": ""}, ConfigurationError, "no tokenizer"),
        ({"output_dir": ""}, ConfigurationError, "no output_dir"),
        ({"steps": ["magic"]}, ConfigurationError, "no cleaning step 'magic'.*minhash"),
        ({"steps": ["language"]}, ConfigurationError, "language=fr"),
        ({"steps": ["pii=3"]}, ConfigurationError, "not complete"),
        ({"tokenizer": "/nowhere"}, TokenizerError, "no such tokenizer"),
        ({"executor": "slurm"}, ConfigurationError, "no Slurm partition"),
    ],
)
def test_keys_that_cannot_be_are_refused(tmp_path: Path, tokenizer: str, keys: dict, error: type, said: str) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(error, match=said):
        prepare(replace(config(tmp_path, tokenizer, corpus), **keys))
    assert not (tmp_path / "out").exists()
