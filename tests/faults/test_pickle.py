"""Fault 14: a malicious pickle as checkpoint or model is never unpickled, and refused by name."""

import json
import os
import pickle
import shutil

import pytest

from fat5.errors import CheckpointError, FAT5Error
from fat5.files import file_sha256
from fat5.tasks import EvaluateConfig, evaluate_model, pretrain
from fat5.train.checkpoint.files import _self_sha256
from made_run import tiny


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, crater):
        self.crater = str(crater)

    def __reduce__(self):
        return os.mkdir, (self.crater,)


@pytest.fixture(scope="module")
def begun(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("begun") / "run"
    pretrain(tiny(prepared, run, steps=2))
    return run


@pytest.fixture
def bomb(tmp_path):
    yield pickle.dumps(Bomb(tmp_path / "crater"))
    assert not (tmp_path / "crater").exists(), "a pickle was executed"


def test_the_bomb_is_real(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "crater")))
    assert (tmp_path / "crater").exists()


FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "optimizer.json", "trainer.json", "rng.json"]


@pytest.mark.parametrize("name", FILES)
def test_in_a_checkpoint_with_a_forged_manifest(prepared, begun, tmp_path, bomb, name):
    shutil.copytree(begun, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-2"
    (folder / name).write_bytes(bomb)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(bomb), "sha256": file_sha256(folder / name)}
    manifest["sha256"] = _self_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = "a pickle, which FAT5 never loads" if name.endswith(".json") else "is not"
    with pytest.raises(CheckpointError, match=rf"{name}: {said}"):
        pretrain(tiny(prepared, tmp_path / "run", steps=2))


@pytest.mark.parametrize("name", ["checkpoint.pt", "step-4"])
def test_as_a_checkpoint_file(prepared, tmp_path, bomb, name):
    (tmp_path / name).write_bytes(bomb)
    with pytest.raises(CheckpointError, match=rf"{name}: is a file, and a checkpoint is a folder; pickles are never"):
        pretrain(tiny(prepared, tmp_path / "run", resume=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_as_a_model(prepared, begun, tmp_path, bomb, name):
    shutil.copytree(begun / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(bomb)
    with pytest.raises(FAT5Error, match=name if name.endswith("bin") else "model"):
        evaluate_model(EvaluateConfig(model=str(tmp_path / "model"), data=[str(prepared)], eval_tokens=100))
