"""Fault 2: SIGKILL at each point inside a save. A part of a checkpoint is never taken for one, and leftovers go."""

import os
import signal

import pytest

from fat5.tasks import pretrain
from fat5.train.checkpoint import files
from made_run import assert_same_run, events, in_child, tiny

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "config.json", "trainer.json")
POINTS = [
    *(f"before {name}" for name in FILES),
    *(f"before fsync of {name}" for name in FILES),
    *(f"after {name}" for name in FILES),
    "before manifest",
    "before rename",
    "after rename",
    "before removing",
    "while removing",
    "after removing",
]
# With keep_last 1 and keep_best 0 the save at step 6 prunes the one of step 4: every point is passed at steps 4 and 6.
PRUNING = {"save_every": 2, "keep_last": 1, "keep_best": 0}
PASS = {"before removing": 2, "while removing": 2, "after removing": 2}


@pytest.fixture(scope="module")
def clean(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("clean") / "run"
    pretrain(tiny(prepared, run, **PRUNING))
    return run


def kill_at(point, passes):
    """Kills the process when it comes to a named point of a save for the given time."""
    seen = 0

    def reached(name):
        nonlocal seen
        seen += name == point
        if seen == passes:
            os.kill(os.getpid(), signal.SIGKILL)

    files.reached = reached


def all_points():
    """Each kind of point once: inside the files, before the manifest, around the rename, in the pruning."""
    fast = {"before model.safetensors", "after trainer.json", "before manifest", "before rename", "after rename"}
    fast |= {"before fsync of trainer.json", "while removing"}
    return [pytest.param(p, marks=() if p in fast else pytest.mark.slow, id=p) for p in POINTS]


@pytest.mark.parametrize("point", all_points())
def test_killed_in_the_third_save(prepared, clean, tmp_path, point):
    run = tmp_path / "run"
    config = tiny(prepared, run, **PRUNING)

    def work():
        kill_at(point, PASS.get(point, 3))
        pretrain(config)

    assert in_child(work) == -signal.SIGKILL
    saved = files_of(run)
    renamed = point in ("after rename", "before removing", "while removing", "after removing")
    # The save at step 6 is complete once renamed; before that the one of step 4 is untouched.
    assert ("step-6" in saved) == renamed
    if not renamed or point == "before removing":
        assert "step-4" in saved
    for name in saved:
        files.verify_checkpoint(run / "checkpoints" / name)
    pretrain(config)
    assert_same_run(clean, run)
    resumed = [event for event in events(run) if event["event"] == "resumed"]
    assert resumed[0]["checkpoint"] == ("step-6" if renamed else "step-4")
    assert resumed[0]["refused"] == []
    assert os.listdir(run / "checkpoints") == ["step-8"], "leftovers are swept and old checkpoints pruned"


def files_of(run):
    """Names that a run could take for checkpoints."""
    return sorted(entry for entry in os.listdir(run / "checkpoints") if entry.startswith("step-"))


def test_every_point_is_one_that_a_save_passes(prepared, tmp_path, monkeypatch):
    """A point that is misspelt here would never kill, and its test could not fail."""
    passed = []
    monkeypatch.setattr(files, "reached", passed.append)
    pretrain(tiny(prepared, tmp_path / "run", **PRUNING))
    assert set(POINTS) <= set(passed)
