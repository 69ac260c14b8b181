"""The tools around transformers on our classes: Trainer, Seq2SeqTrainer, accelerate, PEFT; beside the stock class."""

import copy
import shlex
import sys
import warnings

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import fat5
from fat5.errors import CheckpointError
from fat5.generate.decoding import generate
from fat5.model import FAT5ForConditionalGeneration
from stock import GRADIENT_TOLERANCE, LOGITS_TOLERANCE, SIZES, difference, fat5_like, rows, t5_v1_0, t5_v1_1, umt5

# A few steps of AdamW: what rounding does to a loss of some ten nats.
LOSS_TOLERANCE = 1e-4
TRAINERS = pytest.mark.parametrize(
    ("trainer", "arguments"),
    [(Trainer, TrainingArguments), (Seq2SeqTrainer, Seq2SeqTrainingArguments)],
    ids=["Trainer", "Seq2SeqTrainer"],
)


@pytest.fixture(autouse=True)
def _no_state_of_another_test():
    """accelerate remembers the precision of the last trainer."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def examples(batch):
    return [{name: values[i] for name, values in batch.items()} for i in range(len(batch["input_ids"]))]


def train(cls, arguments, model, folder, data, collator=None, **options):
    """A trainer after three steps, and its losses."""
    chosen = dict(max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, lr_scheduler_type="constant", seed=3)
    quiet = dict(logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = arguments(str(folder), **(chosen | quiet | {"save_strategy": "no"} | options))
        trainer = cls(model, settings, train_dataset=data, eval_dataset=data, data_collator=collator)
        trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@TRAINERS
@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="checkpointed")]
)
def test_a_trainer_goes_the_way_of_stock(trainer, arguments, checkpointing, tmp_path):
    stock, data = t5_v1_1(), examples(rows())
    losses = [
        train(trainer, arguments, model, tmp_path, data, gradient_checkpointing=checkpointing)[1]
        for model in (copy.deepcopy(stock), fat5_like(stock))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=LOSS_TOLERANCE)
    assert losses[1][-1] < losses[1][0]


def test_a_trainer_stops_and_goes_on(tmp_path):
    stock, data = t5_v1_0(), examples(rows())
    _, whole = train(Trainer, TrainingArguments, fat5_like(stock), tmp_path / "a", data, max_steps=4)
    folder, save = tmp_path / "b", dict(save_strategy="steps", save_steps=2)
    train(Trainer, TrainingArguments, fat5_like(stock), folder, data, max_steps=2, **save)
    settings = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2,
        lr_scheduler_type="constant", seed=3, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(fat5_like(t5_v1_0()), settings, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(whole, rel=LOSS_TOLERANCE)
    # What the trainer saved on its way is a stock T5.
    assert type(AutoModelForSeq2SeqLM.from_pretrained(folder / "checkpoint-2")) is T5ForConditionalGeneration


def test_accumulated_gradients_weigh_each_token_alike(tmp_path):
    """Stock T5 takes the trainer's `num_items_in_batch` without using it; with ours, the pieces add up to the whole."""
    ours, batch = fat5_like(t5_v1_1()), rows()
    whole = ours(**batch).loss.item()
    _, losses = train(
        Trainer, TrainingArguments, ours, tmp_path, examples(batch), max_steps=1, per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    assert losses[0] == pytest.approx(whole, rel=LOSS_TOLERANCE)


def test_a_collator_label_smoothing_and_generation_in_evaluation(tmp_path):
    class Tokenizer:
        """What the collator asks a tokenizer for."""

        padding_side = "right"

        def pad(self, features, return_tensors, **_):
            return {name: torch.stack([feature[name] for feature in features]) for name in features[0]}

    stock, data, found = t5_v1_1(), examples(rows()), []
    for model in (copy.deepcopy(stock), fat5_like(stock)):
        trainer, losses = train(
            Seq2SeqTrainer, Seq2SeqTrainingArguments, model, tmp_path, data,
            DataCollatorForSeq2Seq(Tokenizer(), model=model), label_smoothing_factor=0.1,
            predict_with_generate=True, generation_max_length=6,
        )  # fmt: skip
        written = trainer.predict(data).predictions
        found.append((losses, written.tolist()))
    assert found[0][0] == pytest.approx(found[1][0], rel=LOSS_TOLERANCE)
    assert found[0][1] == found[1][1]


def test_bfloat16_by_the_trainer(tmp_path):
    _, losses = train(Trainer, TrainingArguments, fat5_like(t5_v1_1()), tmp_path, examples(rows()), bf16=True)
    assert losses[-1] < losses[0]


def test_accelerate_prepares_trains_and_saves(tmp_path):
    from accelerate import Accelerator

    accelerator, ours = Accelerator(cpu=True), fat5_like(t5_v1_1())
    loader = torch.utils.data.DataLoader(examples(rows()), batch_size=3)
    model, optimizer, loader = accelerator.prepare(ours, torch.optim.AdamW(ours.parameters(), lr=1e-2), loader)
    losses = []
    for _ in range(3):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "model", state_dict=accelerator.get_state_dict(model))
    stock, batch = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval(), rows()
    assert difference(ours.eval()(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE


def lora(model, **options):
    from peft import LoraConfig, TaskType, get_peft_model

    settings = {"task_type": TaskType.SEQ_2_SEQ_LM, "r": 4, "lora_dropout": 0.0, "target_modules": ["q", "v"]}
    return get_peft_model(model, LoraConfig(**(settings | options)))


@pytest.mark.parametrize("family", [t5_v1_0, t5_v1_1, umt5], ids=["v1.0", "v1.1", "umT5"])
def test_lora_trains_and_travels(family, tmp_path):
    """Adapters trained on our class give the same on the stock class, merged or not, and in our decoding loop."""
    from peft import PeftModel

    stock, batch = family(), rows()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    adapted = lora(fat5_like(stock))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    attentions = SIZES["num_layers"] + 2 * SIZES["num_decoder_layers"]
    assert len(trained) == 2 * 2 * attentions  # A and B of q and v
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(5):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    want = adapted(**batch).logits
    adapted.save_pretrained(tmp_path / "adapters")
    on_stock = PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path / "adapters").eval()
    assert difference(on_stock(**batch).logits, want) <= LOGITS_TOLERANCE
    again = PeftModel.from_pretrained(fat5_like(stock), tmp_path / "adapters").eval()
    assert torch.equal(again(**batch).logits, want)
    written = on_stock.generate(**prompt, max_new_tokens=10)
    assert torch.equal(again.generate(**prompt, max_new_tokens=10), written)
    assert torch.equal(generate(again.base_model.model, **prompt, max_new_tokens=10), written)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    assert difference(merged(**batch).logits, want) <= LOGITS_TOLERANCE


def test_lora_on_an_accelerated_stock_model():
    adapted, batch = lora(t5_v1_1(), init_lora_weights=False), rows()
    want = adapted(**batch).loss
    want.backward()
    gradients = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    fat5.accelerate(adapted)
    got = adapted(**batch).loss
    got.backward()
    assert difference(got[None], want[None]) <= LOGITS_TOLERANCE
    for name, gradient in gradients.items():
        assert difference(adapted.get_parameter(name).grad, gradient) <= GRADIENT_TOLERANCE, name


def test_lora_of_a_classifier_trains_its_head_too():
    from peft import TaskType

    batch = rows()
    labels = {"labels": torch.tensor([0, 2, 1])}
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    classifier = fat5_like(t5_v1_1(), fat5.FAT5ForSequenceClassification, num_labels=3)
    adapted = lora(classifier, task_type=TaskType.SEQ_CLS, modules_to_save=["classification_head"])
    adapted(**given, **labels).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("classification_head" in name for name in trained)
    assert all("lora_" in name or "classification_head" in name for name in trained)


def test_a_model_is_pickled_and_copied_whole():
    import pickle

    ours, batch = fat5_like(t5_v1_1()).eval(), rows()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(**batch).logits, ours(**batch).logits)
        assert isinstance(other, FAT5ForConditionalGeneration)


@pytest.mark.parametrize(
    "make",
    [pytest.param(t5_v1_1, id="stock", marks=pytest.mark.slow), pytest.param(lambda: fat5_like(t5_v1_1()), id="fat5")],
)
def test_the_command_that_an_adapter_is_refused_with_merges_it(make, tmp_path, monkeypatch):
    base, batch = make(), rows()
    base.save_pretrained(tmp_path / "base")
    tuned = lora(type(base).from_pretrained(tmp_path / "base"), init_lora_weights=False).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="holds an adapter of PEFT") as raised:
        FAT5ForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    command = shlex.split(str(raised.value).split("merge the two: ")[1])
    assert command[:2] == ["python", "-c"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command[1:2] + command[3:])
    exec(compile(command[2], "merging", "exec"), {})
    merged = FAT5ForConditionalGeneration.from_pretrained(tmp_path / "MERGED").eval()
    assert difference(merged(**batch).logits, tuned(**batch).logits) <= LOGITS_TOLERANCE
