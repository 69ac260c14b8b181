"""Fine-tuning by two processes: losses and metrics of one process, and one set of results."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fat5.errors import ConfigurationError
from fat5.tasks.finetune.config import METRICS, Columns, FinetuneConfig, LoraConfig, TaskData
from fat5.tasks.finetune.finetuning import finetune
from fat5.train import read_rows
from made_ranks import forked, stop_at

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="waits for torch.distributed")

LOSS = 1e-5
"""Relative; the order of float32 sums in twelve steps."""


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """The pretrained model without dropout, which differs from rank to rank."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(base / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
    return folder


def config(model, files, folder, task, *, data=None, **changes):
    """Four steps; a step is about 1,000 tokens."""
    shape = {"max_source_tokens": 64, "max_target_tokens": 32, "batch_size": 16} | (data or {})
    settings = {"precision": "fp32", "steps": 4, "eval_every": 2, "max_new_tokens": 6, "log_every": 100} | changes
    given = TaskData(train=[files[task]], columns=Columns(source="translation.fr", target="translation.en"), **shape)
    return FinetuneConfig(output_dir=str(folder), model=str(model), task=task, data=given, **settings)


def losses(run):
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("task", "how"),
    [
        ("sequence-classification", {"parallel": "ddp"}),
        ("text-to-text", {"parallel": "ddp"}),
        ("sequence-classification", {"parallel": "fsdp"}),
        ("text-to-text", {"parallel": "fsdp", "lora": LoraConfig(rank=4)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_two_processes_fine_tune_as_one(plain, files, tmp_path, task, how):
    """Losses and results of one; with weights that the processes divide too, and adapters beside divided ones."""
    if "lora" in how:
        pytest.importorskip("peft")

    def work(name):
        data = {"encoder_tokens": 512}
        finetune(config(plain, files, tmp_path / name, task, data=data, metric=METRICS[task][0], use_best=True, **how))

    work("one")
    assert forked(lambda: work("two")) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=LOSS)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["metrics"].keys() == two["metrics"].keys()
    first, second = ((tmp_path / name / "predictions.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert len(first) == len(second) == one["examples"]
    assert [json.loads(row)["input"] for row in first] == [json.loads(row)["input"] for row in second]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-2, atol=1e-4)


def test_sizes_for_two_stay_when_one_goes_on(plain, files, tmp_path):
    """Two packs a step, where one process alone would have taken one; the run that goes on keeps them."""
    settings = {"eval_every": 4, "save_every": 2}
    given = config(plain, files, tmp_path / "run", "regression", **settings)

    def stopped():
        stop_at(2, lambda: finetune(given))

    assert forked(stopped) == [0, 0]
    finetune(given)
    finetune(config(plain, files, tmp_path / "alone", "regression", **settings))
    sizes = [yaml.safe_load((tmp_path / name / "config.yaml").read_text())["data"] for name in ("run", "alone")]
    assert sizes[0]["encoder_tokens"] < sizes[1]["encoder_tokens"]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-4")
    assert json.loads((checkpoint / "trainer.json").read_text())["data"]["division"] == [2, 1, 2]


def test_a_seed_each_and_their_results_together(plain, files, tmp_path):
    given = config(plain, files, tmp_path / "run", "regression", steps=1, seeds=2)
    assert forked(lambda: finetune(given)) == [0, 0]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["seeds"] == [0, 1]


def test_too_few_examples_for_the_processes(plain, files, tmp_path):
    def work():
        with pytest.raises(ConfigurationError, match=r"2 examples make 1 pack .* 2 processes cannot share\. Try \d+"):
            finetune(config(plain, files, tmp_path / "run", "regression", data={"batch_size": 2}))

    assert forked(work) == [0, 0]
    assert not (tmp_path / "run").exists()
