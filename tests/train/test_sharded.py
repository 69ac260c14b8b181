"""Weights that processes divide (fsdp, hsdp): losses of one process, checkpoints that any number of them continues, and
the same answers to a kill, to a loss that is not finite, and to what sharded weights do not work with.
"""

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fat5.cli.main import main
from fat5.errors import ConfigurationError, FAT5Error
from fat5.launch import Launch
from fat5.optim import OptimizerConfig
from fat5.tasks import Pretraining, pretrain
from fat5.tasks.sizes import settle
from fat5.train import World, read_rows
from fat5.train.config import RunConfig, shard_size
from fat5.train.sharded import Shards, divides
from fat5.train.step import StepRunner
from made_ranks import finish, forked, noting, rank, stop_at, torchrun, watched
from made_run import last_checkpoint, tiny

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="waits for torch.distributed")

LOSS = 2e-6
"""Relative: sums of float32 in another order, and what twelve steps make of that."""

BF16 = 5e-3
"""The same where a matrix product rounds to bfloat16."""

PLAIN = {"dropout_rate": 0.0}  # dropout differs from rank to rank, as it must
FOUR = {"packs_per_step": 4, "window": 8}


def losses(run):
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


def norms(run):
    return [row["grad_norm"] for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]


def tensors(run, name="model"):
    return load_file(last_checkpoint(run) / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("fsdp-4", {"parallel": "fsdp"}, marks=pytest.mark.slow),  # two of them are below
        pytest.param("hsdp", {"parallel": "hsdp", "hsdp_shard_size": 2}),
    ],
)
def test_four_processes_train_as_one(prepared, tmp_path, name, how):
    """Losses, gradient norms and weights of one process; each piece once; a process holds its share of the weights."""
    settings = {"steps": 5, "save_every": 5, "eval_every": 5, "overrides": PLAIN, "data": FOUR}
    pretrain(tiny(prepared, tmp_path / "one", parallel="fsdp", **settings))
    alone = World(torch.device("cpu"))
    stream = Pretraining.open(settle(tiny(prepared, tmp_path / "none", **settings), alone), alone).loader.stream
    total = sum(tensor.numel() for tensor in tensors(tmp_path / "one").values())
    config = tiny(prepared, tmp_path / name, **settings, **how)
    assert forked(lambda: noting(tmp_path, lambda: pretrain(config)), 4) == [0] * 4
    assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=LOSS)
    assert norms(tmp_path / name) == pytest.approx(norms(tmp_path / "one"), rel=10 * LOSS)
    for file in ("model", "optimizer"):
        one, many = tensors(tmp_path / "one", file), tensors(tmp_path / name, file)
        assert one.keys() == many.keys()
        for key in one:
            torch.testing.assert_close(many[key], one[key], rtol=1e-3, atol=1e-5, msg=f"{name} {file} {key}")
    noted = watched(tmp_path, 4)
    assert all(one["held"] < 1.1 * total / how.get("hsdp_shard_size", 4) for one in noted)
    state = json.loads((last_checkpoint(tmp_path / name) / "trainer.json").read_text())["data"]
    used = np.setdiff1d(np.arange(state["cursor"]), state["window"])
    seen = [piece for one in noted for step in one["pieces"] for piece in step]
    assert sorted(seen) == sorted(stream.resolve(used).piece.tolist())


def test_a_checkpoint_continues_whole_or_divided(prepared, tmp_path, sampled):
    """Two that divide the weights, then one; and one, then two that divide. The model folder is that of any run."""
    settings = {"steps": 4, "save_every": 2, "eval_every": 4, "overrides": PLAIN, "data": FOUR}
    pretrain(tiny(prepared, tmp_path / "straight", **settings))

    def part(name, steps, parallel):
        config = tiny(prepared, tmp_path / name, parallel=parallel, **settings)
        return lambda: pretrain(config) if steps is None else stop_at(steps, lambda: pretrain(config))

    assert forked(part("divided-whole", 2, "fsdp")) == [0, 0]
    part("divided-whole", None, "ddp")()
    part("whole-divided", 2, "ddp")()
    assert forked(part("whole-divided", None, "fsdp")) == [0, 0]
    for name in ("divided-whole", "whole-divided"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "straight"), rel=LOSS)
    ours, theirs = ((tmp_path / name / "model") for name in ("whole-divided", "straight"))
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    one, two = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)
    summary = json.loads((tmp_path / "whole-divided" / "summary.json").read_text())
    straight = json.loads((tmp_path / "straight" / "summary.json").read_text())
    assert summary["parameters"] == straight["parameters"]
    assert len(summary["samples"]) == len(straight["samples"]) > 0


def test_a_lost_process_ends_the_run_which_then_continues_exactly(prepared, tmp_path):
    """SIGKILL of rank 1 inside its fifth step, after its first micro-batch: rank 0 waits for it in a forward pass."""
    data = FOUR | {"num_workers": 0}
    clean, broken = (tiny(prepared, tmp_path / name, data=data, parallel="fsdp") for name in ("clean", "broken"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(broken.to_yaml())
    pass_of = StepRunner._forward_backward

    def killed():
        made = []

        def forward_backward(self, batch, count):
            made.append(1)
            if len(made) == 10 and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return pass_of(self, batch, count)

        StepRunner._forward_backward = forward_backward
        assert main(["pretrain", "--config", str(recipe)]) == 2

    assert forked(lambda: pretrain(clean)) == [0, 0]
    assert forked(killed, seconds=60) == [0, -signal.SIGKILL], "rank 0 left with exit code 2 within a minute"
    assert forked(lambda: pretrain(broken)) == [0, 0]
    assert losses(tmp_path / "broken") == losses(tmp_path / "clean")
    for name in ("model", "optimizer", "rng", "rng-1"):
        one, two = tensors(tmp_path / "clean", name), tensors(tmp_path / "broken", name)
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_a_gradient_that_is_not_finite_on_one_rank_only(prepared, tmp_path):
    """It reaches the rows of one process, and no process makes the update."""
    config = tiny(prepared, tmp_path / "run", data=FOUR, parallel="fsdp", steps=3, on_nan="skip", save_every=3)
    summing = Shards.summing

    def work():
        def broken(self):
            from contextlib import contextmanager

            @contextmanager
            def around():
                with summing(self):
                    yield
                if rank() == 1 and not seen:
                    self._divided[0].grad[0, 0] = math.nan
                seen.append(1)

            return around()

        seen, before, step_of = [], [], StepRunner.run

        def run(self, batches, rate):
            before.append([weight.detach().clone() for weight in self.weights])
            result = step_of(self, batches, rate)
            unchanged = all(torch.equal(one, two) for one, two in zip(before[-1], self.weights, strict=True))
            assert unchanged == (len(before) == 1), len(before)
            return result

        Shards.summing, StepRunner.run = broken, run
        pretrain(replace(config, schedule=replace(config.schedule, name="constant", warmup_steps=0)))

    assert forked(work) == [0, 0]
    first, *rest = (row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train")
    assert first["skipped"]
    assert not any("skipped" in row for row in rest)


def test_copies_that_drift_apart_are_not_saved(prepared, tmp_path):
    """Copies of a shard (hsdp), and weights that each process holds whole."""
    step_of = StepRunner.run

    def work(config, choose):
        def run(self, batches, rate):
            result = step_of(self, batches, rate)
            if rank() == 3:
                next(weight for weight in self.weights if choose(weight)).data.view(-1)[0] += 1e-3
            return result

        StepRunner.run = run
        with pytest.raises(FAT5Error, match="weights of the processes are no longer equal"):
            pretrain(config)

    for name, choose in (("rows", lambda weight: weight.ndim == 2), ("vector", lambda weight: weight.ndim == 1)):
        how = {"parallel": "hsdp", "hsdp_shard_size": 2, "data": FOUR, "steps": 2}
        config = tiny(prepared, tmp_path / name, **how)
        assert forked(lambda: work(config, choose), 4) == [0] * 4  # noqa: B023
        assert not (tmp_path / name / "checkpoints").exists()


CASES = {
    "tied": {
        "overrides": {"tie_word_embeddings": True},
        "gradient_checkpointing": "block",
        "optimizer": OptimizerConfig(name="adamw"),
    },
    "umt5 tables": {"overrides": {"family": "umt5"}},
    "selective": {"gradient_checkpointing": "selective"},
    "plain": {"optimizer": OptimizerConfig(eps_before_correction=True)},
    "bf16": {"precision": "bf16"},
    "bf16-pure": {"precision": "bf16-pure"},
    "compiled": {"compile": True},
    "compiled selective": {"compile": True, "gradient_checkpointing": "selective"},
}
POSITIONS = ("fire", "absolute", "rope", "alibi")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[] if name == "tied" else [pytest.mark.slow, pytest.mark.timeout(900)])
        for name in (*CASES, *POSITIONS)
    ],
)
def test_what_a_run_can_be(prepared, tmp_path, case):
    """Two processes against one, by the same losses."""
    changes = dict(CASES.get(case, {}))
    overrides = PLAIN | changes.pop("overrides", {})
    settings = {"steps": 4, "save_every": 4, "eval_every": 4, "overrides": overrides, "data": FOUR} | changes

    def config(name, parallel):
        made = tiny(prepared, tmp_path / name, parallel=parallel, **settings)
        position_encoding = "t5" if case in CASES else case
        return replace(made, model=replace(made.model, position_encoding=position_encoding))

    pretrain(config("one", "ddp"))
    divided = config("two", "fsdp")
    assert forked(lambda: pretrain(divided), seconds=600) == [0, 0]
    tolerance = BF16 if case.startswith("bf16") else LOSS
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)


@pytest.mark.parametrize(
    ("changes", "processes", "told"),
    [
        ({"parallel": "fsdp", "optimizer": OptimizerConfig(name="muon")}, (4, 4), "muon needs whole matrices"),
        ({"parallel": "hsdp", "optimizer": OptimizerConfig(name="lamb")}, (4, 2), "lamb needs whole matrices"),
        ({"parallel": "fsdp", "precision": "fp16"}, (4, 4), "fp16 scales its loss by the whole gradient"),
        ({"parallel": "hsdp"}, (4, 4), "divides the weights among 4 of 4 processes"),
        ({"parallel": "hsdp", "hsdp_shard_size": 3}, (4, 4), "divides the weights among 3 of 4 processes"),
    ],
)
def test_what_cannot_be_divided_is_refused(changes, processes, told):
    size, local = processes
    with pytest.raises(ConfigurationError, match=told):
        shard_size(RunConfig(output_dir="x", **changes), Launch(0, size, 0, local))


def test_how_many_hold_a_matrix_together():
    def held(size, local, **changes):
        return shard_size(RunConfig(output_dir="x", **changes), Launch(0, size, 0, local))

    assert held(8, 4) == held(1, 1, parallel="fsdp") == held(1, 1, parallel="hsdp") == 1
    assert held(8, 4, parallel="fsdp") == 8
    assert held(8, 4, parallel="hsdp") == held(8, 8, parallel="hsdp", hsdp_shard_size=4) == 4
    with pytest.raises(ConfigurationError, match="hsdp_shard_size is set, and parallel is fsdp"):
        RunConfig(output_dir="x", parallel="fsdp", hsdp_shard_size=2).resolved()
    with pytest.raises(ConfigurationError, match="hsdp_shard_size"):
        RunConfig(output_dir="x", parallel="hsdp", hsdp_shard_size=1).resolved()


def test_which_weights_are_divided():
    assert divides("q.weight", torch.empty(5, 3), 3)  # 2, 2 and 1 rows
    assert not divides("q.weight", torch.empty(5, 3), 4)  # 2, 2, 1 and none
    assert not divides("layer_norm.weight", torch.empty(512), 2)
    assert not divides("block.0.relative_attention_bias.weight", torch.empty(32, 8), 2)


def test_the_main_processs_weights_count(prepared, tmp_path):
    """Every process begins with them, rows and vectors alike."""
    config = tiny(prepared, tmp_path / "run", steps=1, parallel="fsdp")

    def work():
        with World.here() as world:
            task = Pretraining.open(settle(config, world), world)
            torch.manual_seed(world.rank)
            model = task.build_model()
            own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            runner = StepRunner(task.config, model, world)
            plain = runner.parallel.gathered()
            runner.parallel.check()
            if world.is_main:
                for name, weight in plain.named_parameters():
                    assert torch.equal(weight, own[name]), name
                assert plain.shared.weight is plain.encoder.embed_tokens.weight
                assert type(plain).__name__ == "FAT5ForConditionalGeneration"

    assert forked(work) == [0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("data", [FOUR, FOUR | {"packs_per_micro_batch": 2}], ids=["two", "one"])
def test_a_recorded_step_is_a_launched_one(prepared, tmp_path, data):
    """With two micro-batches and one; the evaluations between steps gather embeddings that the next step makes old."""
    for graphs in (True, False):
        run = tmp_path / str(graphs)
        settings = {"steps": 8, "eval_every": 2, "save_every": 4, "precision": "bf16", "compile": True}
        config = tiny(prepared, run, parallel="fsdp", cuda_graphs=graphs, overrides=PLAIN, data=data, **settings)
        recipe = tmp_path / f"{graphs}.yaml"
        recipe.write_text(config.to_yaml())
        code, _, error = finish(torchrun("pretrain", "--config", str(recipe)))
        assert code == 0, error
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=LOSS)
    assert norms(tmp_path / "True") == pytest.approx(norms(tmp_path / "False"), rel=10 * LOSS)
