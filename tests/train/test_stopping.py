"""Early stopping and the best checkpoint: a run ends where its evaluations grow worse, and can export its best one."""

import json

import pytest
from safetensors.torch import load_file

from fat5.errors import ConfigurationError
from fat5.tasks import Pretraining, pretrain
from fat5.train.checkpoint.state import RunState
from made_run import tiny


def worse_after(step):
    """A rank by which step `step` is the best evaluation."""
    return lambda self, scores: abs(scores["step"] - step) + 1.0


def test_a_run_stops_early_and_exports_its_best(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretraining, "rank", worse_after(4))
    config = tiny(prepared, tmp_path / "run", steps=20, eval_every=2, save_every=2)
    config.patience, config.use_best = 2, True
    summary = pretrain(config)
    assert summary["steps"] == 8  # 4 was the best; 6 and 8 were worse
    best = load_file(tmp_path / "run" / "checkpoints" / "step-4" / "model.safetensors")
    kept = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(kept[name].equal(best[name]) for name in kept)
    progress = json.loads((tmp_path / "run" / "checkpoints" / "step-8" / "trainer.json").read_text())["progress"]
    assert progress["best_step"] == 4
    assert progress["stopped_early"] is True
    again = pretrain(config)  # nothing is left to train
    assert again["steps"] == 8


def test_without_patience_it_trains_to_the_end_and_exports_the_last(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretraining, "rank", worse_after(2))
    assert pretrain(tiny(prepared, tmp_path / "run", steps=6, eval_every=2, save_every=2))["steps"] == 6
    last = load_file(tmp_path / "run" / "checkpoints" / "step-6" / "model.safetensors")
    kept = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(kept[name].equal(last[name]) for name in kept)


def test_a_rank_that_is_no_number_is_never_the_best():
    state = RunState(step=1)
    state.note_rank(float("nan"), 1)
    assert (state.best_step, state.stopped_early) == (-1, True)
    state.note_rank(2.0, 1)
    assert (state.best_step, state.worse_in_a_row, state.stopped_early) == (1, 0, False)


def test_progress_of_an_earlier_version(tmp_path):
    saved = vars(RunState(step=3))
    for name in ("best_rank", "best_step", "worse_in_a_row", "stopped_early"):
        del saved[name]
    state = RunState()
    state.restore(saved, tmp_path)
    assert (state.step, state.best_step, state.stopped_early) == (3, -1, False)


@pytest.mark.parametrize(("key", "value"), [("patience", 0), ("patience", 1.5)])
def test_refused(prepared, tmp_path, key, value):
    config = tiny(prepared, tmp_path / "run", steps=2)
    setattr(config, key, value)
    with pytest.raises(ConfigurationError, match=key):
        pretrain(config)


def test_the_best_must_be_kept(prepared, tmp_path):
    config = tiny(prepared, tmp_path / "run", steps=2)
    config.use_best, config.keep_best = True, 0
    with pytest.raises(ConfigurationError, match="keep_best"):
        pretrain(config)
