"""Two processes train as one does: the same examples, the same losses, equal weights; a checkpoint goes from the one to
the other.
"""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fat5.cli.main import main
from fat5.errors import ConfigurationError, FAT5Error
from fat5.launch import Launch
from fat5.tasks import Pretraining, pretrain
from fat5.tasks.sizes import settle
from fat5.train import NonFiniteError, World, read_rows
from fat5.train import world as world_module
from fat5.train.checkpoint.generators import count_processes
from fat5.train.step import StepRunner
from made_ranks import forked, noting, rank, stop_at, watched
from made_run import events, last_checkpoint, tiny

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="waits for torch.distributed")

LOSS = 2e-6
"""Relative: sums of float32 in another order, and what twelve steps (or two passes) make of that; 1e-7 was seen."""

PLAIN = {"dropout_rate": 0.0}  # dropout differs from rank to rank, as it must
FOUR = {"packs_per_step": 4, "window": 8}


def losses(run):
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


def write(config, path):
    path.write_text(config.to_yaml())
    return str(path)


def test_two_processes_train_as_one(prepared, tmp_path, capfd):
    """By the command, over two passes: losses, examples by id, weights bit for bit, one summary on stdout. Under
    torchrun itself it runs in tests/faults/test_ranks.py.
    """
    data = FOUR | {"encoder_tokens": 1024, "decoder_tokens": 512}
    settings = {"steps": 21, "save_every": 21, "eval_every": 21, "overrides": PLAIN, "data": data}
    pretrain(tiny(prepared, tmp_path / "one", **settings))
    recipe = write(tiny(prepared, tmp_path / "two", **settings), tmp_path / "two.yaml")
    capfd.readouterr()
    assert forked(lambda: noting(tmp_path, lambda: main(["pretrain", "--config", recipe]))) == [0, 0]
    output, error = capfd.readouterr()
    assert json.loads(output)["steps"] == 21
    assert "rank 1" not in error
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=LOSS)
    first, second = watched(tmp_path)
    assert first["weights"] == second["weights"]
    assert len(set(first["weights"])) == 20, "they change in every step but the last, whose learning rate is 0"

    # What the order says was used up to the last step: each position once, all of them.
    alone = World(torch.device("cpu"))
    stream = Pretraining.open(settle(tiny(prepared, tmp_path / "none", **settings), alone), alone).loader.stream
    state = json.loads((last_checkpoint(tmp_path / "two") / "trainer.json").read_text())["data"]
    used = np.setdiff1d(np.arange(state["cursor"]), state["window"])
    assert used.size > 2 * sum(stream.num_pieces)
    seen = [piece for one in (first, second) for step in one["pieces"] for piece in step]
    assert sorted(seen) == sorted(stream.resolve(used).piece.tolist())


def test_a_checkpoint_continues_under_another_number_of_processes(prepared, tmp_path):
    settings = {"steps": 6, "save_every": 3, "eval_every": 3, "overrides": PLAIN, "data": FOUR}
    pretrain(tiny(prepared, tmp_path / "straight", **settings))

    def part(name, steps):
        config = tiny(prepared, tmp_path / name, **settings)
        return lambda: pretrain(config) if steps is None else stop_at(steps, lambda: pretrain(config))

    part("one-two", 3)()
    assert forked(part("one-two", None)) == [0, 0]
    assert forked(part("two-one", 3)) == [0, 0]
    assert count_processes(last_checkpoint(tmp_path / "two-one")) == 2
    part("two-one", None)()
    assert count_processes(last_checkpoint(tmp_path / "two-one")) == 1
    for name, told in (("one-two", "1 process made"), ("two-one", "2 processes made")):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "straight"), rel=LOSS)
        resumed = next(event for event in events(tmp_path / name) if event["event"] == "resumed")
        assert resumed["checkpoint"] == "step-3"
        assert told in resumed["warnings"][0]


def test_dropout_differs_and_a_lost_process_ends_the_run_which_then_continues_exactly(prepared, tmp_path):
    """SIGKILL of rank 1 in its fifth step, with no launcher to end rank 0. Generators come back by rank."""
    data = FOUR | {"num_workers": 1}  # a worker has its rank's connections too, and must not keep them open
    clean, broken = (tiny(prepared, tmp_path / name, data=data) for name in ("clean", "broken"))
    step_of = StepRunner.run

    def killed():
        made = []

        def run(self, batches, rate):
            made.append(1)
            if len(made) == 5 and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step_of(self, batches, rate)

        StepRunner.run = run
        assert main(["pretrain", "--config", write(broken, tmp_path / f"{rank()}.yaml")]) == 2

    assert forked(lambda: pretrain(clean)) == [0, 0]
    assert forked(killed, seconds=60) == [0, -signal.SIGKILL], "rank 0 left with exit code 2 within a minute"
    assert not (tmp_path / "broken" / "run.lock").exists()
    assert forked(lambda: pretrain(broken)) == [0, 0]
    assert losses(tmp_path / "broken") == losses(tmp_path / "clean")
    ours, theirs = last_checkpoint(tmp_path / "clean"), last_checkpoint(tmp_path / "broken")
    for name in ("model", "optimizer", "rng", "rng-1"):
        one, two = load_file(ours / f"{name}.safetensors"), load_file(theirs / f"{name}.safetensors")
        assert all(torch.equal(one[key], two[key]) for key in one), name
    first, second = (load_file(ours / f"{name}.safetensors")["torch"] for name in ("rng", "rng-1"))
    assert not torch.equal(first, second), "one generator for all would drop the same units in every rank"


def test_a_loss_that_is_not_finite_on_one_rank_only(prepared, tmp_path):
    """No rank makes the update, and the ids of both are on record."""
    config, step_of = tiny(prepared, tmp_path / "run", data=FOUR), StepRunner._forward_backward

    def work():
        def backward(self, batch, count):
            loss = step_of(self, batch, count)
            return loss * math.nan if rank() == 1 else loss

        StepRunner._forward_backward = backward
        with pytest.raises(NonFiniteError, match="at step 1; the update was not made"):
            pretrain(config)

    assert forked(work) == [0, 0]
    rows = json.loads((tmp_path / "run" / "nonfinite-step-1.json").read_text())["micro_batches"]
    assert [row["rank"] for row in rows] == [0, 0, 1, 1]
    assert [row["loss"] == "nan" for row in rows] == [False, False, True, True]
    assert all(row["pieces"] for row in rows)


def test_weights_that_drift_apart_are_not_saved(prepared, tmp_path):
    config, step_of = tiny(prepared, tmp_path / "run", data=FOUR), StepRunner.run

    def work():
        def run(self, batches, rate):
            result = step_of(self, batches, rate)
            if rank() == 1:
                self.weights[0].data[0, 0] += 1e-3
            return result

        StepRunner.run = run
        with pytest.raises(FAT5Error, match="weights of the processes are no longer equal"):
            pretrain(config)

    assert forked(work) == [0, 0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_a_launcher_says():
    whole = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }  # fmt: skip
    assert Launch.here(whole) == Launch(3, 4, 1, 2)
    assert Launch.here({"MASTER_ADDR": "a"}) == Launch.here(whole | {"WORLD_SIZE": "1"}) == Launch()
    for name in whole:
        with pytest.raises(ConfigurationError, match=f"{name} not set"):
            Launch.here({key: value for key, value in whole.items() if key != name})
    for odd, told in (({"RANK": "-1"}, "not whole"), ({"RANK": "4"}, "no such"), ({"LOCAL_RANK": "2"}, "no such")):
        with pytest.raises(ConfigurationError, match=told):
            Launch.here(whole | odd)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"4 processes .* 2 GPUs\. .*--nproc-per-node 2"):
        world_module._own_device(Launch(0, 4, 0, 4))


@pytest.mark.parametrize("verb", ["tokenizer", "prepare", "demo", "evaluate", "plot"])
def test_verbs_of_one_process(verb, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    assert main([verb]) == 2
    assert "runs in one process" in capsys.readouterr().err


def test_a_step_that_cannot_be_shared(prepared, tmp_path):
    config = tiny(prepared, tmp_path / "run", data={"packs_per_step": 3})

    def work():
        with pytest.raises(ConfigurationError, match=r"\(3\) is not a multiple of 2 processes"):
            pretrain(config)

    assert forked(work) == [0, 0]
    assert not (tmp_path / "run").exists()


def test_sizes_left_open_are_shared(prepared, tmp_path):
    """One pack a step would do for so little text; two processes get one each."""
    config = tiny(prepared, tmp_path / "run", steps=2, overrides=PLAIN, data={"packs_per_step": "auto"})
    assert forked(lambda: pretrain(config)) == [0, 0]
    assert "packs_per_step: 2" in (tmp_path / "run" / "config.yaml").read_text()
