"""Fault 3: SIGTERM, SIGUSR1, Ctrl-C finish the step, save and leave; a second signal leaves at once."""

import os
import signal
import time

import pytest

from fat5.tasks import pretrain
from fat5.train import RunStopped, evaluation, verify_checkpoint
from fat5.train.log.metrics import MetricsLog
from fat5.train.signals import ECHO
from fat5.train.step import StepRunner
from fat5.train.trainer import Trainer
from made_run import (
    assert_same_run,
    events,
    in_child,
    last_checkpoint,
    tiny,
    watch_steps,
)

SECONDS_TO_LEAVE = 20.0  # a step and a save take well under one; the rest is a busy machine


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_in_a_step_saves_after_it(prepared, tmp_path, number, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(StepRunner, "run", raising_at(monkeypatch, 3, number))
    with pytest.raises(RunStopped, match=f"stopped by {number.name} after step 3; the same command continues"):
        pretrain(tiny(prepared, run, save_every=8, data={"num_workers": 1}))
    assert verify_checkpoint(last_checkpoint(run))["step"] == 3
    assert not (run / "run.lock").exists()


def raising_at(monkeypatch, at, number):
    """A step that is interrupted by a signal in its middle, once."""
    step_of, steps = StepRunner.run, watch_steps(monkeypatch)

    def run(self, batches, rate):
        if steps[-1] == at:
            os.kill(os.getpid(), number)
        return step_of(self, batches, rate)

    return run


def test_a_stopped_run_ends_like_one_that_was_not(prepared, tmp_path, monkeypatch):
    """Stopped at step 4, where an evaluation and a save were due, and at step 5, where neither was."""
    pretrain(tiny(prepared, tmp_path / "clean"))
    write = MetricsLog.write
    for stop in (4, 5):

        def signalling(self, row, stop=stop):
            write(self, row)
            if row.get("kind") == "train" and row["step"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(MetricsLog, "write", signalling)
        with pytest.raises(RunStopped, match=f"SIGTERM after step {stop}"):
            pretrain(tiny(prepared, tmp_path / "run"))
    monkeypatch.setattr(MetricsLog, "write", write)
    pretrain(tiny(prepared, tmp_path / "run"))
    assert_same_run(tmp_path / "clean", tmp_path / "run")
    assert [event["event"] for event in events(tmp_path / "run")].count("stopped") == 2


@pytest.fixture(scope="module")
def clean(prepared, tmp_path_factory):
    """A run that no signal stops."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    pretrain(tiny(prepared, folder, eval_tokens=600))
    return folder


@pytest.mark.parametrize("at", [0, 4, 8])
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(prepared, clean, tmp_path, monkeypatch, at):
    """Before the first step, in the middle, and after the last step, whose checkpoint is not yet saved then."""
    batches = []
    score, run_evaluation = evaluation.part_of_tokens, Trainer._evaluate_if_due

    def interrupted(batch, part):
        batches.append(batch)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(batch, part)

    def noted(self):
        monkeypatch.setattr(evaluation, "part_of_tokens", interrupted if self.state.step == at else score)
        return run_evaluation(self)

    monkeypatch.setattr(Trainer, "_evaluate_if_due", noted)
    with pytest.raises(RunStopped, match=f"stopped by SIGTERM after step {at}; the same command continues"):
        pretrain(tiny(prepared, tmp_path / "run", eval_tokens=600))
    assert len(batches) == 2, "no batch is scored after the signal"
    assert verify_checkpoint(last_checkpoint(tmp_path / "run"))["step"] == at
    monkeypatch.undo()
    pretrain(tiny(prepared, tmp_path / "run", eval_tokens=600))
    assert_same_run(clean, tmp_path / "run")
    saved = [verify_checkpoint(last_checkpoint(folder))["val_loss"] for folder in (clean, tmp_path / "run")]
    assert saved[0] == saved[1] is not None, "the checkpoint knows its validation loss all the same"


def test_a_second_signal_leaves_at_once(prepared, tmp_path):
    run = tmp_path / "run"
    config = tiny(prepared, run)

    def work():
        def stuck(self, batches, rate):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(ECHO + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        StepRunner.run = stuck
        pretrain(config)

    began = time.monotonic()
    assert in_child(work) == 128 + signal.SIGTERM
    assert time.monotonic() - began < SECONDS_TO_LEAVE
    assert not (run / "checkpoints").exists()


def test_handlers_are_given_back(prepared, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    pretrain(tiny(prepared, tmp_path / "run", steps=1))
    assert signal.getsignal(signal.SIGTERM) is before
