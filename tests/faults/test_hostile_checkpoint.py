"""JSON of a checkpoint with values of other types, every hash made anew: passed over, or refused in one line."""

import copy
import json
import math
import shutil

import pytest
import torch

from fat5.errors import FAT5Error
from fat5.tasks import pretrain
from fat5.train import CheckpointStore
from fat5.train.checkpoint.files import _self_sha256
from made_run import events, tiny

# Each place takes one of the twelve odd values, and each value comes to many places; all values take minutes.
SOME = pytest.mark.parametrize("one_in", [12, pytest.param(1, marks=pytest.mark.slow)])
ODD = [None, True, -5, 10**30, 1.5, math.nan, "x", [], {}, [[]], {"x": {}}]


@pytest.fixture(scope="module")
def begun(prepared, tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("begun") / "run"
    pretrain(tiny(prepared, run, steps=4, precision="fp16"))
    return run


def write_manifest(folder, manifest):
    manifest["sha256"] = _self_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def places(content, path=()):
    """Paths to every value of a JSON document, at most two of each list."""
    items = content.items() if isinstance(content, dict) else enumerate(content[:2])
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(content, path, value):
    """A copy with one value replaced; `...` removes it."""
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


@SOME
def test_a_manifest_signed_anew_is_passed_over(begun, tmp_path, one_in):
    shutil.copytree(begun / "checkpoints", tmp_path / "checkpoints")
    folder, store = tmp_path / "checkpoints" / "step-4", CheckpointStore(tmp_path / "checkpoints")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    refusals = 0
    for number, path in enumerate(places(manifest)):
        for odd in (*ODD, ...)[number % one_in :: one_in]:
            write_manifest(folder, changed(manifest, path, odd))
            choice = store.choose()
            assert choice.folder.name in ("step-2", "step-4")
            refusals += bool(choice.refused)
    assert refusals > 100 / one_in
    (folder / "manifest.json").write_bytes(b"[" * 100_000)
    assert store.choose().refused == [f"{folder / 'manifest.json'}: is not JSON"]


@pytest.mark.parametrize("name", ["../step-2/config.json", "..", "", "/etc/passwd", "a/b"])
def test_a_manifest_names_its_own_files_only(begun, tmp_path, name):
    shutil.copytree(begun / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "step-4"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    write_manifest(folder, manifest)
    assert "names files outside its folder" in CheckpointStore(tmp_path / "checkpoints").choose().refused[0]


def test_a_copy_under_another_name_is_passed_over(prepared, begun, tmp_path, capfd):
    """A copy of step 2 named step 99 is not the newest; it counts for no rule, and stays where it is."""
    shutil.copytree(begun, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-2", checkpoints / "step-99")
    shutil.copytree(checkpoints / "step-2", checkpoints / "step-3")
    shutil.copytree(checkpoints / "step-4", checkpoints / "step-04")
    pretrain(tiny(prepared, tmp_path / "run", steps=6, precision="fp16", keep_last=1, keep_best=0))
    assert events(tmp_path / "run")[-2]["checkpoint"] == "step-4"
    told = capfd.readouterr().err
    assert f"checkpoint passed over: {checkpoints / 'step-99'}: is the checkpoint of step 2" in told
    assert sorted(entry.name for entry in checkpoints.iterdir()) == ["step-04", "step-3", "step-6", "step-99"]


@pytest.fixture(scope="module")
def trainer(prepared, tmp_path_factory):
    """The trainer of the run `begun`, and its folder."""

    from fat5.tasks import Pretraining
    from fat5.tasks.sizes import settle
    from fat5.train import RunDirectory, World
    from fat5.train.run import new_trainer

    config = tiny(prepared, tmp_path_factory.mktemp("trainer") / "run", precision="fp16")
    world = World(torch.device("cpu"))
    run = RunDirectory(config.output_dir)
    run.mark()
    return new_trainer(Pretraining.open(settle(config, world), world), run, world)


@SOME
@pytest.mark.parametrize("name", ["trainer.json", "optimizer.json", "rng.json"])
def test_a_state_of_other_types_is_refused_in_one_line(begun, trainer, tmp_path, name, one_in):
    """Either the checkpoint is restored, where the value does not matter, or one line says why not."""
    folder = tmp_path / "step-4"
    shutil.copytree(begun / "checkpoints" / "step-4", folder)
    content = json.loads((folder / name).read_bytes())
    refusals = []
    for number, path in enumerate(places(content)):
        for odd in (*ODD, ...)[number % one_in :: one_in]:
            (folder / name).write_text(json.dumps(changed(content, path, odd)))
            try:
                trainer.restore(folder)
            except FAT5Error as error:
                refusals.append(str(error))
    assert len(refusals) > 20 / one_in
    (folder / name).write_bytes(b"[" * 100_000)
    with pytest.raises(FAT5Error, match=rf"{name}: is not JSON"):
        trainer.restore(folder)
