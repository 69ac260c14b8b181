"""A whole run: what it leaves, that it learns, and that its settings mean what they say."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from fat5.files import PICKLE_SUFFIXES
from fat5.optim import OptimizerConfig, ScheduleConfig
from fat5.tasks import pretrain
from fat5.train import RunDirectory, read_rows
from made_run import assert_same_run, last_checkpoint, rows_without_times, tiny

SPLIT = 2e-5  # float32 sums in another order, over eight steps


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """A run long enough to learn something, of which the rest of this page looks at."""
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = {"steps": 40, "save_every": 20, "eval_every": 20, "schedule": ScheduleConfig(warmup_steps=4)}
    overrides = {"dropout_rate": 0.0}
    summary = pretrain(tiny(prepared, folder, overrides=overrides, tensorboard=True, **settings))
    return folder, summary


def test_summary_keeps_the_public_contract(run):
    folder, summary = run
    assert json.loads((folder / "summary.json").read_text()) == summary
    promised = "parameters seconds train_tokens tokens_per_second val_loss_first val_loss_last val_loss_by_denoiser"
    for key in (*promised.split(), "encoder_fill", "decoder_fill", "tokens_dropped", "unigram_entropy"):
        assert key in summary, key
    assert len(summary["val_loss_by_denoiser"]) == 7
    assert [sample["denoiser"] for sample in summary["samples"]] == list(summary["val_loss_by_denoiser"])
    for sample in summary["samples"]:
        assert sample["denoiser"].startswith(sample["prompt"][:3]), "the mode token of its denoiser"
        assert "<extra_id_0>" in sample["prompt"]
        assert sample["target"].startswith("<extra_id_0>")
        assert sample["completion"]
        assert "</s>" not in "".join(sample.values())
    assert summary["tokens_dropped"] == 0
    assert 0.5 < summary["encoder_fill"] <= 1.0
    assert 0 < summary["unigram_entropy"] < math.log(1024)
    assert summary["seconds"] > 0


def test_a_run_is_not_lost_for_its_samples(prepared, tmp_path, monkeypatch, capsys):
    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr("fat5.tasks.pretraining.validation_samples", no_memory)
    summary = pretrain(tiny(prepared, tmp_path / "run", steps=1))
    assert summary["samples"] == []
    assert "no samples were written: no memory" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").is_file()


def test_it_learns(run):
    _, summary = run
    assert summary["val_loss_last"] < summary["val_loss_first"] - 0.5
    assert summary["val_loss_first"] == pytest.approx(math.log(1024), abs=0.6)


def test_metrics_have_a_row_a_step(run):
    folder, summary = run
    rows = read_rows(folder / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 41))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 20, 40]
    assert train[-1]["tokens"] == summary["train_tokens"] == sum(row["step_tokens"] for row in train)
    for row in train:
        assert 0 <= row["data_wait_fraction"] <= 1
        assert row["tokens_per_second"] > 0
        assert 0 < row["mfu"] < 1
    assert train[3]["lr"] == 0.02
    assert train[-1]["lr"] == 0.0


def test_no_pickle_is_written_and_the_drawing_is_a_picture(run):
    folder, _ = run
    assert not [path for path in folder.rglob("*") if path.suffix in PICKLE_SUFFIXES]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert not (folder / "run.lock").exists()
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_stock_transformers_loads_the_model(run):
    folder, _ = run
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert type(model) is T5ForConditionalGeneration
    inputs = tokenizer("[S] Le paquet", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1
    saved, exported = (load_file(path / "model.safetensors") for path in (last_checkpoint(folder), folder / "model"))
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[key], exported[key]) for key in saved)


def test_a_checkpoint_is_a_model_too(run):
    folder, _ = run
    assert type(AutoModelForSeq2SeqLM.from_pretrained(last_checkpoint(folder))) is T5ForConditionalGeneration


def test_the_resolved_recipe_makes_the_same_configuration(prepared, run):
    from fat5.cli.parsing import parse
    from fat5.tasks import PretrainConfig

    folder, _ = run
    again = PretrainConfig(**parse(PretrainConfig, ["--config", str(folder / "config.yaml")], "pretrain"))
    assert again.to_dict() == yaml.safe_load((folder / "config.yaml").read_text())
    assert again.precision == "fp32"
    assert again.optimizer.lr == 0.02


def test_a_finished_run_stays_as_it_is(prepared, run, sampled):
    folder, summary = run
    log = (folder / "metrics.jsonl").read_bytes()
    settings = {"steps": 40, "save_every": 20, "eval_every": 20, "schedule": ScheduleConfig(warmup_steps=4)}
    again = pretrain(tiny(prepared, folder, overrides={"dropout_rate": 0.0}, **settings))
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert (folder / "metrics.jsonl").read_bytes() == log


def losses(folder):
    return [row["loss"] for row in rows_without_times(folder) if row["kind"] == "train"]


def test_the_division_of_a_step_changes_nothing(prepared, tmp_path):
    """Micro-batches hold unequal numbers of targets: only the mean over all tokens of the step is the same for all."""
    for packs in (1, 2, 4):
        data = {"packs_per_step": 4, "packs_per_micro_batch": packs}
        pretrain(tiny(prepared, tmp_path / str(packs), overrides={"dropout_rate": 0.0}, data=data))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=SPLIT)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "4"), rel=SPLIT)


def test_workers_and_checkpointing_of_gradients_change_nothing(prepared, tmp_path):
    pretrain(tiny(prepared, tmp_path / "plain"))
    pretrain(tiny(prepared, tmp_path / "workers", data={"num_workers": 2}))
    assert_same_run(tmp_path / "plain", tmp_path / "workers")
    pretrain(tiny(prepared, tmp_path / "saving", gradient_checkpointing=True))
    assert losses(tmp_path / "saving") == pytest.approx(losses(tmp_path / "plain"), rel=SPLIT)


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "bf16-pure", "fp16"])
def test_low_precision_learns_and_resumes_exactly(prepared, tmp_path, precision):
    settings = {"precision": precision, "steps": 6, "save_every": 3, "eval_every": 6}
    pretrain(tiny(prepared, tmp_path / "straight", **settings))
    pretrain(tiny(prepared, tmp_path / "parts", **(settings | {"keep_last": 5})))
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-6")
    pretrain(tiny(prepared, tmp_path / "parts", **settings))
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    weights = load_file(last_checkpoint(tmp_path / "parts") / "model.safetensors")
    expected = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    assert {weight.dtype for weight in weights.values()} == {expected}
    reference = pretrain(tiny(prepared, tmp_path / "fp32", **(settings | {"precision": "fp32"})))
    rows = [row for row in rows_without_times(tmp_path / "parts") if row["kind"] == "eval"]
    assert rows[-1]["loss"] == pytest.approx(reference["val_loss_last"], abs=0.02)
    if precision == "bf16-pure":
        moments = load_file(last_checkpoint(tmp_path / "parts") / "optimizer.safetensors")
        assert any(key.startswith("compensation/") for key in moments)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "adafactor", "lamb")]


@pytest.mark.parametrize("name", ["muon", *SLOW])
def test_every_optimizer_trains_and_resumes_exactly(prepared, tmp_path, name):
    if name == "lamb":
        pytest.importorskip("pytorch_optimizer")
    settings = {"optimizer": OptimizerConfig(name=name), "steps": 6, "save_every": 3, "eval_every": 6}
    pretrain(tiny(prepared, tmp_path / "straight", **settings))
    pretrain(tiny(prepared, tmp_path / "parts", **settings))
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-6")
    pretrain(tiny(prepared, tmp_path / "parts", **settings))
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_rules_of_keeping(prepared, tmp_path):
    pretrain(tiny(prepared, tmp_path / "run", save_every=1, eval_every=3, keep_last=2, keep_best=1, keep_every=5))
    kept = sorted(int(folder.name[5:]) for folder in (tmp_path / "run" / "checkpoints").iterdir())
    evaluated = {row["step"]: row["loss"] for row in rows_without_times(tmp_path / "run") if row["kind"] == "eval"}
    best = min((step for step in evaluated if step), key=lambda step: evaluated[step])
    assert kept == sorted({5, 7, 8, best})


def test_a_marked_folder_may_hold_other_things(prepared, tmp_path):
    """As the demo does: it marks its folder, and puts tokenizer and shards beside the run."""
    RunDirectory(tmp_path / "run").mark()
    (tmp_path / "run" / "data").mkdir()
    assert pretrain(tiny(prepared, tmp_path / "run", steps=1))["steps"] == 1


@pytest.mark.slow
def test_compiled_in_one_graph(prepared, tmp_path):
    pretrain(tiny(prepared, tmp_path / "eager", overrides={"dropout_rate": 0.0}))
    config = tiny(prepared, tmp_path / "compiled", overrides={"dropout_rate": 0.0})
    torch._dynamo.utils.counters.clear()
    pretrain(replace(config, compile=True))
    assert not torch._dynamo.utils.counters["graph_break"]
    # One graph for training and one for evaluation, for the whole run.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
