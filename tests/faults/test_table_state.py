"""Rows 5, 6, 12 to 14, 20 of the fault table (docs/reliability.md), injected into the command as a user starts it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fat5.data import sample_path
from made_run import assert_same_run, command, cut, events, flip, last_checkpoint, remove, tiny

FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "rng.safetensors",
    "rng.json",
    "trainer.json",
    "config.json",
    "manifest.json",
)


def damages(names, quick):
    """Every damage of every file; those not in `quick` take the slow lane."""
    for damage in (flip, cut, remove):
        for name in names:
            marks = () if (damage, name) in quick else pytest.mark.slow
            yield pytest.param(damage, name, marks=marks, id=f"{damage.__name__}-{name}")


def refused(code, error):
    """The one line of a command that must fail."""
    assert code == 2, error
    assert "Traceback" not in error
    return error.splitlines()[-1]


# 5. A damaged checkpoint.


@pytest.mark.parametrize(("damage", "name"), damages(FILES, [(flip, "optimizer.safetensors")]))
def test_a_damaged_checkpoint(prepared, undisturbed, cut_back, damage, name):
    damage(cut_back / "checkpoints" / "step-6" / name)
    config = tiny(prepared, cut_back, keep_last=4)
    log = (cut_back / "metrics.jsonl").read_bytes()
    assert f"step-6/{name}: " in refused(*command(config, "--strict"))
    assert (cut_back / "metrics.jsonl").read_bytes() == log, "refused before anything was touched"
    code, error = command(config)
    assert code == 0, error
    assert "checkpoint passed over: " in error
    assert "step-4 (the newest that verifies)" in error
    assert f"step-6/{name}: " in events(cut_back)[-2]["refused"][0]
    assert_same_run(undisturbed, cut_back)


# 6. A damaged data shard.


@pytest.mark.parametrize(
    ("damage", "name"), damages(("train/00000.ds", "train/00000.ds.index"), [(flip, "train/00000.ds")])
)
def test_a_damaged_shard(prepared, tmp_path, damage, name):
    shutil.copytree(prepared, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / ".verified", ignore_errors=True)
    damage(tmp_path / "data" / name)
    line = refused(*command(tiny(tmp_path / "data", tmp_path / "run")))
    assert str(tmp_path / "data") in line
    assert name in line
    assert not (tmp_path / "run" / "checkpoints").exists()


# 12. Another configuration.


def test_another_seed_is_refused(prepared, cut_back):
    recipe = (cut_back / "config.yaml").read_bytes()
    line = refused(*command(tiny(prepared, cut_back), "--seed", "1"))
    assert "comes from another configuration: seed was 0 and is now 1" in line
    assert (cut_back / "config.yaml").read_bytes() == recipe


@pytest.mark.slow
def test_another_learning_rate_is_warned_about_and_intervals_are_not(prepared, cut_back):
    code, error = command(tiny(prepared, cut_back), "--optimizer.lr", "0.01", "--log_every", "1")
    assert code == 0, error
    assert "warning: optimizer.lr was 0.02 when the checkpoint was made and is now 0.01" in error
    assert error.count("warning: ") == 1


# 13. A checkpoint of an older format.


def test_format_0_is_refused_by_its_number(prepared, cut_back):
    """Not passed over: nothing is wrong with it, and an older one would lose its steps."""
    script = Path(__file__).parents[1] / "made_format_0.py"
    subprocess.run([sys.executable, str(script), str(cut_back / "checkpoints" / "step-6")], check=True)
    line = refused(*command(tiny(prepared, cut_back)))
    assert "step-6/manifest.json: has format version 0, and this FAT5 reads version 1. Continue with the FAT5" in line
    assert last_checkpoint(cut_back).name == "step-6"


# 14. A malicious pickle.


class Bomb:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, crater):
        self.crater = str(crater)

    def __reduce__(self):
        return os.mkdir, (self.crater,)


@pytest.mark.parametrize(
    "place",
    [
        "checkpoint",
        pytest.param("weights", marks=pytest.mark.slow),
        pytest.param("tokenizer", marks=pytest.mark.slow),
        pytest.param("shard", marks=pytest.mark.slow),
        pytest.param("corpus", marks=pytest.mark.slow),
    ],
)
def test_a_pickle(prepared, cut_back, tmp_path, place):
    bomb = pickle.dumps(Bomb(tmp_path / "crater"))
    shutil.copytree(prepared, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / ".verified", ignore_errors=True)
    config, words = tiny(tmp_path / "data", cut_back), []
    if place == "checkpoint":
        words, named = ["--resume", str(tmp_path / "step-9.pt")], "step-9.pt"
        (tmp_path / "step-9.pt").write_bytes(bomb)
    elif place == "weights":
        words, named = ["--strict"], "step-6/model.safetensors"
        (cut_back / "checkpoints" / named).write_bytes(bomb)
    else:
        named = {"tokenizer": "tokenizer/tokenizer.json", "shard": "train/00000.ds", "corpus": "corpus.parquet"}[place]
        (tmp_path / "data" / named).write_bytes(bomb)
    if place == "corpus":
        words = [str(tmp_path / "data" / named), "--tokenizer", str(prepared / "tokenizer"), "--output_dir", "out"]
        line = refused(*fat5("prepare", *words, cwd=tmp_path))
    else:
        line = refused(*command(config, *words))
    assert Path(named).name in line or str(Path(named).parent) in line
    assert not (tmp_path / "crater").exists(), "a pickle was executed"
    pickle.loads(bomb)
    assert (tmp_path / "crater").exists(), "the bomb is real"


def fat5(*words, cwd):
    done = subprocess.run([sys.executable, "-m", "fat5", *words], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stderr


# 20. Bad input.

LONG = b"100 MB, made by the test"
CORPORA = {
    "empty.jsonl": (b"", "empty.jsonl: this file is empty"),
    "binary.txt": (bytes(range(256)) * 10, "binary.txt: is not .txt but binary data"),
    "latin.txt": ("été\n".encode("latin-1"), "latin.txt:1: invalid UTF-8"),
    "long.jsonl": (LONG, "long.jsonl:1: a line longer than 32 MiB"),
    "column.jsonl": (json.dumps({"body": "text"}).encode() + b"\n", "no column 'text'; it has body"),
}


@pytest.mark.parametrize(
    "name", ["latin.txt", *(pytest.param(n, marks=pytest.mark.slow) for n in CORPORA if n != "latin.txt")]
)
@pytest.mark.parametrize("verb", ["tokenizer", pytest.param("prepare", marks=pytest.mark.slow)])
def test_a_bad_corpus(prepared, tmp_path, verb, name):
    content, said = CORPORA[name]
    (tmp_path / name).write_bytes(b'{"text": "' + b"a" * 100_000_000 + b'"}\n' if content is LONG else content)
    words = ["--tokenizer", str(prepared / "tokenizer")] if verb == "prepare" else ["--vocab_size", "1024"]
    code, error = fat5(verb, name, *words, "--output_dir", "out", cwd=tmp_path)
    assert code == 2, error
    assert said in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == [name], "nothing half-written"


def test_an_unknown_key(prepared, tmp_path):
    config = tiny(prepared, tmp_path / "run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml().replace("\nsteps:", "\nstepz:"))
    code, error = fat5("pretrain", "--config", str(recipe), cwd=tmp_path)
    assert "stepz" in refused(code, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_corpus_without_text(tmp_path, prepared):
    """A folder without a file, and one whose texts are all empty."""
    (tmp_path / "nothing").mkdir()
    for corpus, said in (("nothing", "nothing"), (sample_path("fr"), "no column 'body'")):
        words = [str(corpus), "--tokenizer", str(prepared / "tokenizer"), "--output_dir", "out"]
        code, error = fat5("prepare", *words, "--corpus.text_column", "body", cwd=tmp_path)
        assert said in refused(code, error)
        assert os.listdir(tmp_path) == ["nothing"]
