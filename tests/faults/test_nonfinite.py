"""Fault 7: NaN or Inf in a loss or gradient. No update; abort, skip or rewind; the examples are on record."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from fat5.optim import OptimizerConfig
from fat5.tasks import pretrain
from fat5.train import NonFiniteError
from fat5.train.step import StepRunner
from made_run import events, last_checkpoint, rows_without_times, tiny, watch_steps


def break_step(monkeypatch, broken, what="gradient", deferred=False):
    """Makes the loss or a gradient of the given steps (counted from 1) not finite; returns the pieces of the first."""
    step_of, backward = StepRunner.run, StepRunner._forward_backward
    pieces: dict[int, list] = {}
    steps = watch_steps(monkeypatch)

    def run(self, batches, rate):
        self.deferred = deferred
        if steps[-1] in broken:
            pieces.setdefault(steps[-1], [batch.piece[: batch.num_examples].tolist() for batch in batches])
        return step_of(self, batches, rate)

    def spoiled(self, batch, count):
        loss = backward(self, batch, count)
        if steps[-1] in broken and what == "gradient":
            self.weights[3].grad[0] = math.inf
        return loss * math.nan if steps[-1] in broken and what == "loss" else loss

    monkeypatch.setattr(StepRunner, "run", run)
    monkeypatch.setattr(StepRunner, "_forward_backward", spoiled)
    return pieces


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("deferred", [False, True], ids=["at-once", "a-step-later"])
def test_abort_is_the_default(prepared, tmp_path, monkeypatch, what, deferred):
    """`deferred` is how a GPU does it: the device skips the update, the host hears of it with the next step."""
    run = tmp_path / "run"
    pieces = break_step(monkeypatch, {5}, what, deferred)
    with pytest.raises(NonFiniteError, match=r"at step 5; the update was not made.*nonfinite-step-5\.json"):
        pretrain(tiny(prepared, run))
    dumped = json.loads((run / "nonfinite-step-5.json").read_text())
    assert [row["pieces"] for row in dumped["micro_batches"]] == pieces[5]
    assert pieces[5][0]
    assert last_checkpoint(run).name == "step-4"
    row = rows_without_times(run)[-1]
    assert (row["step"], row["skipped"]) == (5, True)
    assert row["loss" if what == "loss" else "grad_norm"] is None
    assert not (run / "model").exists()


# Muon cannot skip on the device, so it is never deferred.
WAYS = [("adamw_scale", False), ("adamw_scale", True), ("adamw", False), ("adamw", True), ("muon", False)]


@pytest.mark.parametrize(("optimizer", "deferred"), WAYS)
def test_skip_leaves_weights_and_optimizer_untouched(prepared, tmp_path, monkeypatch, optimizer, deferred):
    break_step(monkeypatch, {5}, deferred=deferred)
    settings = {"steps": 5, "save_every": 1, "keep_last": 2, "optimizer": OptimizerConfig(name=optimizer)}
    pretrain(tiny(prepared, tmp_path / "run", on_nan="skip", **settings))
    before, after = (tmp_path / "run" / "checkpoints" / f"step-{step}" for step in (4, 5))
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = load_file(before / name), load_file(after / name)
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), key


def test_skip_goes_on_with_the_next_step(prepared, tmp_path, monkeypatch):
    break_step(monkeypatch, {3, 4})
    summary = pretrain(tiny(prepared, tmp_path / "run", on_nan="skip"))
    rows = [row for row in rows_without_times(tmp_path / "run") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in rows if row.get("skipped")] == [3, 4]
    assert math.isfinite(summary["val_loss_last"])


def test_a_run_that_is_broken_for_good_ends(prepared, tmp_path, monkeypatch):
    break_step(monkeypatch, set(range(3, 100)))
    with pytest.raises(NonFiniteError, match="11 steps in a row"):
        pretrain(tiny(prepared, tmp_path / "run", on_nan="skip", steps=50, save_every=50, eval_every=50))


def test_rewind_takes_the_last_checkpoint_and_the_data_that_follows(prepared, tmp_path, monkeypatch):
    """The data of steps 5 to 7 is passed over: the run redoes steps 5 to 7 with what would have been 8 to 10."""
    pretrain(tiny(prepared, tmp_path / "clean", steps=12, save_every=4, eval_every=50))
    done = []
    step_of, steps = StepRunner.run, watch_steps(monkeypatch)

    def run(self, batches, rate):
        done.append((steps[-1], batches[0].piece[0].item()))
        return step_of(self, batches, rate)

    monkeypatch.setattr(StepRunner, "run", run)
    pretrain(tiny(prepared, tmp_path / "plain", steps=12, save_every=4, eval_every=50))
    order = [piece for _, piece in done]
    done.clear()
    spoil_once(monkeypatch, 7)
    pretrain(tiny(prepared, tmp_path / "run", steps=12, save_every=4, eval_every=50, on_nan="rewind"))
    assert [step for step, _ in done] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11, 12]
    assert [piece for _, piece in done][:12] == order
    rows = [row["step"] for row in rows_without_times(tmp_path / "run") if row["kind"] == "train"]
    assert rows == list(range(1, 13))
    discarded = [json.loads(line) for line in (tmp_path / "run" / "discarded.jsonl").read_text().splitlines()]
    assert [row["step"] for row in discarded] == [5, 6, 7]
    assert "nonfinite" in [event["event"] for event in events(tmp_path / "run")]


def spoil_once(monkeypatch, at):
    backward, steps, left = StepRunner._forward_backward, watch_steps(monkeypatch), [at]

    def spoiled(self, batch, count):
        loss = backward(self, batch, count)
        if left and steps[-1] == left[0]:
            left.clear()
            return loss * math.nan
        return loss

    monkeypatch.setattr(StepRunner, "_forward_backward", spoiled)


def test_rewind_without_a_checkpoint_says_so(prepared, tmp_path, monkeypatch):
    break_step(monkeypatch, {2})
    with pytest.raises(NonFiniteError, match="no checkpoint to rewind to"):
        pretrain(tiny(prepared, tmp_path / "run", on_nan="rewind", save_every=4))


def test_fp16_lowers_its_scale_instead(prepared, tmp_path, monkeypatch):
    """An infinite gradient under loss scaling is no fault of the data."""
    break_step(monkeypatch, {3})
    pretrain(tiny(prepared, tmp_path / "run", precision="fp16", steps=4))
    rows = [row for row in rows_without_times(tmp_path / "run") if row["kind"] == "train"]
    assert rows[2]["skipped"]
    assert rows[2]["loss_scale"] == rows[1]["loss_scale"] / 2
    assert not (tmp_path / "run" / "nonfinite-step-3.json").exists()
