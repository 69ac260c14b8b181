"""Rows 7, 8, 11, 15, 16, 18, 19 of the fault table (reliability.md), injected into the command as a user starts it."""

import errno
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fat5.optim import ScheduleConfig
from fat5.tasks import Pretraining
from fat5.tasks.sizes import settle
from fat5.train import RunDirectory, World, read_rows
from made_ranks import finish, torchrun
from made_run import assert_same_run, command, events, last_checkpoint, rows_without_times, tiny

CLOSE = 2e-5  # relative, of losses under another division of the sums (float32)
SPIKE_AT = 60


def losses(run):
    return [row["loss"] for row in rows_without_times(run) if row["kind"] == "train"]


def pieces_of(config, step):
    """Piece ids of the micro-batches of a step, from 1, made again by the loader."""
    world = World(torch.device("cpu"))
    loader = Pretraining.open(settle(config, world), world).loader
    count = loader.micro_batches_per_step
    batches = itertools.islice(loader, (step - 1) * count, step * count)
    return [batch.piece[: batch.num_examples].tolist() for batch in batches]


# 7. NaN or Inf.


@pytest.mark.parametrize(
    ("what", "factor"), [("gradient", math.inf), pytest.param("loss", math.nan, marks=pytest.mark.slow)]
)
def test_a_number_that_is_not_finite(prepared, undisturbed, tmp_path, what, factor):
    run = tmp_path / "run"
    config = tiny(prepared, run, keep_last=4)
    code, error = command(config, fault={"numbers": {"step": 5, "what": what, "factor": factor}})
    assert code == 2
    assert "at step 5; the update was not made" in error.splitlines()[-1]
    assert "nonfinite-step-5.json" in error.splitlines()[-1]
    dumped = json.loads((run / "nonfinite-step-5.json").read_text())
    assert [row["pieces"] for row in dumped["micro_batches"]] == pieces_of(config, 5)
    assert last_checkpoint(run).name == "step-4"
    code, error = command(config)
    assert code == 0, error
    assert_same_run(undisturbed, run)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="waits for torch.distributed")
@pytest.mark.parametrize("action", ["skip", "abort"])
def test_a_gradient_that_is_not_finite_on_one_rank_only(prepared, tmp_path, action):
    """Both ranks pass over the update: weights and optimizer of step 5 are those of step 4."""
    run, data = tmp_path / "run", {"packs_per_step": 4}
    config = tiny(prepared, run, data=data, on_nan=action, save_every=1, keep_last=9)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    fault = {"numbers": {"step": 5, "rank": 1, "what": "gradient", "factor": math.inf}}
    code, _, error = finish(torchrun("pretrain", "--config", str(tmp_path / "run.yaml"), fault=fault))
    assert (code == 0) == (action == "skip"), error
    dumped = json.loads((run / "nonfinite-step-5.json").read_text())
    assert [row["rank"] for row in dumped["micro_batches"]] == [0, 0, 1, 1]
    assert [row["pieces"] for row in dumped["micro_batches"]] == pieces_of(config, 5)
    assert last_checkpoint(run).name == ("step-8" if action == "skip" else "step-4")
    if action == "skip":
        before, after = (run / "checkpoints" / f"step-{step}" for step in (4, 5))
        for name in ("model.safetensors", "optimizer.safetensors"):
            one, two = load_file(before / name), load_file(after / name)
            assert all(torch.equal(one[key], two[key]) for key in one), name
        assert [row["step"] for row in rows_without_times(run) if row.get("skipped")] == [5]


# 8. A loss spike.


@pytest.mark.parametrize("action", ["warn", pytest.param("rewind", marks=pytest.mark.slow)])
def test_a_loss_spike(prepared, tmp_path, action):
    """The event has the ids of its examples; the loss stays in the log, or moves to discarded.jsonl on a rewind."""
    run = tmp_path / "run"
    config = tiny(prepared, run, steps=70, save_every=40, eval_every=70, on_spike=action)
    code, error = command(config, fault={"numbers": {"step": SPIKE_AT, "factor": 3.0}})
    assert code == 0, error
    (spike,) = [event for event in events(run) if event["event"] == "spike"]
    assert (spike["step"], spike["action"]) == (SPIKE_AT, action)
    assert [row["pieces"] for row in spike["micro_batches"]] == pieces_of(config, SPIKE_AT)
    assert f"at step {SPIKE_AT} lies {spike['sigmas']:.1f} standard deviations above those before it" in error
    log = run / ("metrics.jsonl" if action == "warn" else "discarded.jsonl")
    kept = [row for row in read_rows(log) if row["kind"] == "train" and row["step"] == SPIKE_AT]
    assert [row["loss"] for row in kept] == [spike["loss"]]
    assert [row["step"] for row in rows_without_times(run) if row["kind"] == "train"] == list(range(1, 71))
    if action == "rewind":
        assert "rewound to step 40" in error
        assert [row["step"] for row in read_rows(log)] == list(range(41, SPIKE_AT + 1))


# 11. Other numbers of processes, workers and micro-batches.


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="waits for torch.distributed")
def test_world_workers_and_micro_batches_change_on_the_way(prepared, tmp_path):
    """1, 2 and 4 processes; 0, 2 and 4 workers; micro-batches of 4, 2 and 1 packs: the same examples and losses."""
    shapes = {"overrides": {"dropout_rate": 0.0}, "eval_every": 12}

    def config(name, steps, workers, width):
        data = {"packs_per_step": 4, "packs_per_micro_batch": width, "num_workers": workers}
        return tiny(
            prepared,
            tmp_path / name,
            steps=steps,
            save_every=4,
            data=data,
            schedule=ScheduleConfig(name="constant", warmup_steps=0),
            **shapes,
        )

    code, error = command(config("straight", 12, 0, 1))
    assert code == 0, error
    for steps, processes, workers, width in ((4, 1, 0, 4), (8, 2, 2, 2), (12, 4, 4, 1)):
        (tmp_path / "run.yaml").write_text(config("run", steps, workers, width).to_yaml())
        code, _, error = finish(torchrun("pretrain", "--config", str(tmp_path / "run.yaml"), processes=processes))
        assert code == 0, error
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=CLOSE)
    one, two = (json.loads((last_checkpoint(tmp_path / n) / "trainer.json").read_bytes()) for n in ("run", "straight"))
    for key in ("cursor", "window", "step"):
        assert one["data"][key] == two["data"][key]
    code, _, error = finish(torchrun("pretrain", "--config", str(tmp_path / "run.yaml"), processes=3))
    assert code != 0
    assert error.count("packs_per_step (4) is not a multiple of 3 processes × 1 packs_per_micro_batch") == 1


# 15. Out of memory.


def test_out_of_memory_on_a_cpu(prepared, tmp_path):
    """The address space of the real process ends in its step 3."""
    data = {"encoder_tokens": 8192, "decoder_tokens": 4096}
    config = tiny(prepared, tmp_path / "run", data=data)
    code, error = command(config, fault={"memory": {"step": 3, "megabytes": 16}})
    assert code == 2, error
    line = error.splitlines()[-1]
    assert "out of memory in step 3 with 8,192 encoder and 4,096 decoder tokens a micro-batch (peak " in line
    assert "Lower data.packs_per_micro_batch or set gradient_checkpointing" in line
    assert "Traceback" not in error
    code, error = command(config)
    assert code == 0, error
    assert "step-2 (the newest that verifies)" in error


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu(prepared, tmp_path):
    data = {"encoder_tokens": 16384, "decoder_tokens": 8192}
    config = tiny(prepared, tmp_path / "run", data=data, overrides={"d_model": 512, "d_ff": 2048, "num_layers": 4})
    code, error = command(config, fault={"gpu_memory": {"megabytes": 700}}, seconds=280)
    assert code == 2, error
    line = error.splitlines()[-1]
    assert "out of GPU memory in " in line
    assert "GiB). Lower data.packs_per_micro_batch or set gradient_checkpointing" in line
    assert "Traceback" not in error


# 16. Trackers, network, log disk.

HANGS, FAILS = "import time; time.sleep(1000)", "raise ConnectionError('no network')"
LIBRARY = """
class Run:
    url = None

    def log(self, *arguments, **settings):
        {log}

    def finish(self, *arguments):
        pass

def init(**settings):
    {init}
    return Run()
"""


@pytest.mark.parametrize("name", ["wandb", pytest.param("trackio", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("place", "act"),
    [
        ("init", FAILS),
        *(pytest.param(p, a, marks=pytest.mark.slow) for p, a in (("log", FAILS), ("init", HANGS), ("log", HANGS))),
    ],
)
def test_a_tracker_without_its_network(prepared, undisturbed, tmp_path, name, place, act):
    """A library in the place of the tracker's own, which fails or hangs."""
    (tmp_path / f"{name}.py").write_text(LIBRARY.format(**({"log": "pass", "init": "pass"} | {place: act})))
    config = tiny(prepared, tmp_path / "run", keep_last=4, log_every=1, report_to=[name])
    code, error = command(config, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert code == 0, error
    assert f"warning: {name} " in error
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_tracker_without_its_disk(prepared, undisturbed, tmp_path):
    """A file stands where TensorBoard would write."""
    RunDirectory(tmp_path / "run").mark()
    (tmp_path / "run" / "tensorboard").touch()
    config = tiny(prepared, tmp_path / "run", keep_last=4, log_every=1, report_to=["tensorboard"])
    code, error = command(config)
    assert code == 0, error
    assert "warning: tensorboard is off: " in error
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_full_disk_under_the_log(prepared, undisturbed, tmp_path):
    code, error = command(tiny(prepared, tmp_path / "run"), fault={"log_disk": {"code": errno.ENOSPC}})
    assert code == 0, error
    assert error.count("warning: metrics.jsonl cannot be written (No space left on device); training goes on") == 1
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (undisturbed, tmp_path / "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


# 18. Kernels that do not repeat.


def test_a_run_repeats_bit_for_bit(prepared, undisturbed, tmp_path):
    code, error = command(tiny(prepared, tmp_path / "run", keep_last=4, deterministic=True))
    assert code == 0, error
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.gpu
def test_a_run_repeats_bit_for_bit_on_a_gpu(prepared, tmp_path):
    for name in ("one", "two"):
        code, error = command(tiny(prepared, tmp_path / name, deterministic=True), seconds=280)
        assert code == 0, error
    assert_same_run(tmp_path / "one", tmp_path / "two")


# 19. Padding, neighbours, the batch.


def test_a_document_does_not_depend_on_its_company(undisturbed):
    """In a process of its own: padding, neighbours and order change nothing, be a neighbour NaN."""
    script = Path(__file__).parents[1] / "in_company.py"
    done = subprocess.run([sys.executable, str(script), str(undisturbed / "model")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differs = json.loads(done.stdout)
    assert differs["packed, other neighbours"] == differs["packed, a neighbour that is NaN"] == 0.0
    assert max(differs.values()) < CLOSE
