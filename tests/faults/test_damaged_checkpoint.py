"""Fault 5: a flipped byte, a truncation or a missing file. Found before use, named, and the one before is taken."""

import json
import shutil

import pytest

from fat5.errors import CheckpointError
from fat5.tasks import pretrain
from made_run import assert_same_run, cut, events, flip, remove, tiny

FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "rng.safetensors",
    "trainer.json",
    "config.json",
)


@pytest.fixture(scope="module")
def stopped(prepared, tmp_path_factory):
    """A clean run, and the same cut back to its checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("damage")
    pretrain(tiny(prepared, folder / "clean", keep_last=4))
    shutil.copytree(folder / "clean", folder / "stopped")
    for step in (2, 8):
        shutil.rmtree(folder / "stopped" / "checkpoints" / f"step-{step}")
    return folder


DAMAGES = [(damage, name) for damage in (flip, cut, remove) for name in (*FILES, "manifest.json")]


@pytest.mark.parametrize(("damage", "name"), DAMAGES, ids=[f"{damage.__name__}-{name}" for damage, name in DAMAGES])
def test_damage_is_found_and_named(stopped, damage, name, tmp_path):
    from fat5.train import CheckpointStore

    shutil.copytree(stopped / "stopped" / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "step-6" / name)
    store = CheckpointStore(tmp_path / "checkpoints")
    choice = store.choose()
    if name == "manifest.json" and damage is flip and not choice.refused:
        pytest.fail("a manifest with a flipped byte was taken")
    assert choice.folder.name == "step-4"
    assert f"step-6/{name}" in choice.refused[0] or name == "manifest.json"
    assert "step-6" in choice.refused[0]
    with pytest.raises(CheckpointError, match="step-6"):
        store.choose(strict=True)


def test_the_one_before_is_taken_and_the_run_ends_as_the_clean_one(prepared, stopped, tmp_path, capfd):
    shutil.copytree(stopped / "stopped", tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "step-6" / "optimizer.safetensors")
    pretrain(tiny(prepared, tmp_path / "run", keep_last=4))
    assert_same_run(stopped / "clean", tmp_path / "run")
    resumed = events(tmp_path / "run")[-2]
    assert resumed["checkpoint"] == "step-4"
    assert "optimizer.safetensors: is damaged: its SHA-256 is not the manifest's" in resumed["refused"][0]
    told = capfd.readouterr().err
    assert "passed over" in told
    assert "step-4 (the newest that verifies)" in told


def test_strict_refuses(prepared, stopped, tmp_path):
    shutil.copytree(stopped / "stopped", tmp_path / "run")
    cut(tmp_path / "run" / "checkpoints" / "step-6" / "model.safetensors")
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has .* bytes where its manifest says"):
        pretrain(tiny(prepared, tmp_path / "run", strict=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log, "refused before anything was touched"


def test_when_all_are_damaged_it_refuses(prepared, stopped, tmp_path):
    shutil.copytree(stopped / "stopped", tmp_path / "run")
    for step in (4, 6):
        flip(tmp_path / "run" / "checkpoints" / f"step-{step}" / "trainer.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint verifies.*step-6.*step-4"):
        pretrain(tiny(prepared, tmp_path / "run"))


def test_another_format_version_is_named(prepared, stopped, tmp_path):
    shutil.copytree(stopped / "stopped", tmp_path / "run")
    for step in (4, 6):
        path = tmp_path / "run" / "checkpoints" / f"step-{step}" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(CheckpointError, match="format version 99, and this FAT5 reads version 1"):
        pretrain(tiny(prepared, tmp_path / "run"))
