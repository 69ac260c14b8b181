"""`fat5 finetune` at the smallest size: kills, seeds, adapters, what a run leaves (test_evaluate.py: in each task)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fat5.cli.main import main
from fat5.data import load_tokenizer
from fat5.errors import CheckpointError
from fat5.generate import Decoding, complete
from fat5.model import load_model
from fat5.optim import OptimizerConfig
from fat5.tasks.finetune import predicting
from fat5.tasks.finetune.config import Columns, FinetuneConfig, LoraConfig, TaskData
from fat5.tasks.finetune.finetuning import finetune
from fat5.train import read_rows
from made_run import events, in_child, kill_at_row

LEARNING = OptimizerConfig(lr=2e-2)


def config(base, files, folder, task, *, data=None, **changes):
    """Four steps on 120 examples."""
    columns = Columns(source="translation.fr", target="translation.en")
    shape = {"max_source_tokens": 64, "max_target_tokens": 32, "stride": 16, "batch_size": 16} | (data or {})
    settings = {"precision": "fp32", "steps": 4, "eval_every": 2, "max_new_tokens": 6, "log_every": 100} | changes
    given = TaskData(train=[files[task]], columns=columns, **shape)
    return FinetuneConfig(output_dir=str(folder), model=str(base), task=task, data=given, **settings)


def test_a_fine_tuned_model_knows_its_prefix(base, files, tmp_path, capsys):
    """`fat5 generate` writes what the run predicted, from the plain text and from one that has the prefix already."""
    finetune(config(base, files, tmp_path / "run", "text-to-text", data={"prefix": "fr: "}))
    first = predictions(tmp_path / "run")[0]
    plain = first["input"].removeprefix("fr: ")
    assert plain != first["input"]
    words = ["generate", "--model", str(tmp_path / "run"), "--max_new_tokens", "6"]
    said = []
    for more in ([plain], [first["input"]], [plain, "--mode", "text"], [plain, "--prefix", ""]):
        capsys.readouterr()
        assert main([*words, *more]) == 0
        said.append(capsys.readouterr().out.strip())
    assert said[:3] == [first["prediction"].strip()] * 3


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def same_models(one, other):
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("task", ["text-to-text", "question-answering"])
def test_a_killed_run_continues_bit_for_bit(base, files, tmp_path, task):
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    steps = {"steps": 6, "save_every": 1, "dropout": 0.1}
    finetune(config(base, files, clean, task, **steps))
    deadly = kill_at_row(7)

    def work():
        deadly()
        finetune(config(base, files, killed, task, **steps))

    assert in_child(work) == -9
    assert not (killed / "summary.json").exists()
    finetune(config(base, files, killed, task, **steps))
    assert [event["event"] for event in events(killed)].count("resumed") == 1
    assert same_models(clean, killed)
    for name in ("predictions.jsonl", "results.json"):
        assert (clean / name).read_bytes() == (killed / name).read_bytes()


def test_predictions_that_were_killed_go_on(base, files, tmp_path, monkeypatch):
    clean, stopped = tmp_path / "clean", tmp_path / "stopped"
    finetune(config(base, files, clean, "text-to-text", predict_batch=4))
    written = []
    add = predicting.PredictionFile.add

    def add_and_fail(self, some):
        add(self, some)
        written.append(len(some))
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(predicting.PredictionFile, "add", add_and_fail)
    with pytest.raises(KeyboardInterrupt):
        finetune(config(base, files, stopped, "text-to-text", predict_batch=4))
    partial = stopped / "predictions.partial.jsonl"
    partial.write_bytes(partial.read_bytes() + b'[3, "half a li')  # a kill in the middle of a line
    finetune(config(base, files, stopped, "text-to-text", predict_batch=4))
    total = len(predictions(clean))
    assert written[:2] == [4, 4]
    assert sum(written) == total  # none was made twice
    assert (clean / "predictions.jsonl").read_bytes() == (stopped / "predictions.jsonl").read_bytes()
    assert not partial.exists()


def test_generate_writes_what_the_predictions_say(base, files, tmp_path):
    finetune(config(base, files, tmp_path / "run", "text-to-text", data={"max_source_tokens": 512}))
    folder = tmp_path / "run" / "model"
    rows = predictions(tmp_path / "run")
    answers = complete(
        load_model(folder), load_tokenizer(folder), [row["input"] for row in rows], mode="text",
        decoding=Decoding(max_new_tokens=6, batch_size=32),
    )  # fmt: skip
    assert [answer.text for answer in answers] == [row["prediction"] for row in rows]


def test_lora_trains_the_adapters_alone_and_peft_reads_them(base, files, tmp_path):
    peft = pytest.importorskip("peft")
    finetune(config(base, files, tmp_path / "run", "text-to-text", lora=LoraConfig(rank=4)))
    before = load_file(base / "model" / "model.safetensors")
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name in before if not before[name].equal(merged[name])}
    assert changed
    assert all(name.split(".")[-2] in LoraConfig().targets for name in changed)
    adapted = peft.PeftModel.from_pretrained(load_model(base / "model"), tmp_path / "run" / "adapter")
    plain = adapted.merge_and_unload().state_dict()
    for name in merged:
        torch.testing.assert_close(plain[name], merged[name])
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_seeds(base, files, tmp_path):
    summary = finetune(config(base, files, tmp_path / "run", "sequence-classification", seeds=2))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    own = [json.loads((tmp_path / "run" / f"seed-{seed}" / "results.json").read_text()) for seed in (0, 1)]
    values = [one["metrics"]["accuracy"]["value"] for one in own]
    assert results["metrics"]["accuracy"]["values"] == values
    assert summary["results"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    assert not same_models(tmp_path / "run" / "seed-0", tmp_path / "run" / "seed-1")


def test_a_folder_of_seeds_names_its_runs(base, files, tmp_path, capsys):
    finetune(config(base, files, tmp_path / "runs", "regression", seeds=2, steps=2))
    capsys.readouterr()
    assert main(["evaluate", "--model", str(tmp_path / "runs")]) == 2
    assert f"Give one of its runs: {tmp_path}/runs/seed-0" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "runs"), "--output", str(tmp_path / "seeds.png")]) == 0
    assert (tmp_path / "seeds.png").is_file()


def test_the_command_ends_with_a_table_and_a_summary(base, files, tmp_path, capsys):
    folder = tmp_path / "run"
    task = "sequence-classification"
    words = ["--model", str(base), "--task", task, "--data.train", files[task]]
    more = ["--data.max_source_tokens", "64", "--steps", "4", "--eval_every", "1", "--patience", "1"]
    # At a rate of 0 no evaluation beats the first, so that the run stops after one more.
    rate = ["--optimizer.lr", "0", "--output_dir", str(folder)]
    assert main(["finetune", *words, *more, *rate]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["stopped_early"]
    assert "stopped early: no evaluation since that of step 0 was better" in told.err
    assert "newly initialised" not in told.err
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    lines = {line.split()[0]: line.split()[1] for line in told.err.splitlines() if line.split()}
    assert {name: lines[name] for name in metrics} == {name: f"{one['value']:.4f}" for name, one in metrics.items()}
    assert main(["generate", "--model", str(folder), "Un"]) == 2
    assert "it holds a FAT5ForSequenceClassification" in capsys.readouterr().err


def test_random_weights_have_the_form_of_a_given_model(base, files, tmp_path):
    again = config("none", files, tmp_path / "run", "text-to-text", tokenizer=str(base / "model"))
    finetune(again)
    assert load_model(tmp_path / "run" / "model").config.d_model == 32
    head = read_rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert head["loss"] == pytest.approx(7.1, abs=0.5)  # log 1,152 and a little: nothing is learned yet


def test_heads_learn(base, files, tmp_path):
    summary = finetune(
        config(base, files, tmp_path / "run", "token-classification", steps=60, eval_every=60, optimizer=LEARNING)
    )
    assert summary["val_loss_last"] < 0.7 * summary["val_loss_first"]


def test_a_test_example_longer_than_all_others_has_room(base, files, tmp_path):
    """Packs were sized by the examples of train and validation alone."""
    rows = [json.loads(line) for line in Path(files["regression"]).read_text().splitlines()]
    short = [row | {"text": row["text"][:40]} for row in rows]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in short))
    test.write_text(json.dumps(rows[0] | {"text": "Le noyau est libre. " * 40}) + "\n")
    shape = {"test": [str(test)], "max_source_tokens": 512, "batch_size": 2}
    finetune(config(base, {"regression": str(train)}, tmp_path / "run", "regression", data=shape))
    assert len(predictions(tmp_path / "run")) == 1


def test_a_checkpoint_of_an_unfinished_run_has_the_tokenizer_of_its_data(base, files, tmp_path):
    run = tmp_path / "unfinished"
    shutil.copytree(base, run)
    shutil.rmtree(run / "model")
    finetune(config(run, files, tmp_path / "run", "text-to-text", steps=1))
    own = load_tokenizer(tmp_path / "run" / "model").info
    assert own.sha256 == load_tokenizer(base / "model").info.sha256


def test_another_model_of_the_same_form_is_not_continued(base, files, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    finetune(config(base, files, tmp_path / "run", "text-to-text", steps=1))
    with pytest.raises(CheckpointError, match="model was"):
        finetune(config(other, files, tmp_path / "run", "text-to-text", steps=1))


def test_kept_predictions_of_other_settings_are_not_taken_over(base, files, tmp_path, monkeypatch):
    add = predicting.PredictionFile.add

    def add_and_fail(self, some):
        add(self, some)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predicting.PredictionFile, "add", add_and_fail)
        with pytest.raises(KeyboardInterrupt):
            finetune(config(base, files, tmp_path / "run", "text-to-text", predict_batch=4))
    finetune(config(base, files, tmp_path / "run", "text-to-text", predict_batch=4, max_new_tokens=3))
    finetune(config(base, files, tmp_path / "whole", "text-to-text", predict_batch=4, max_new_tokens=3))
    kept, made = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("run", "whole"))
    assert kept == made
