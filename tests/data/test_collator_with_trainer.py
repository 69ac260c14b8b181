"""The collator and the datasets in Trainer and Seq2SeqTrainer, on a tiny stock T5."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from fat5.data import DataCollatorForUL2, UL2Dataset, UL2Examples, load_tokenizer, sample_path
from fat5.errors import DataError
from made_corpus import write_corpus
from made_tokenizers import byte_t5, sentencepiece
from stock import SIZES

PAGE = Path(__file__).parents[2].joinpath("docs", "collator.md")
SIZE = dict(SIZES, num_layers=1, num_decoder_layers=1)


def model(vocab_size: int) -> T5ForConditionalGeneration:
    torch.manual_seed(1)
    return T5ForConditionalGeneration(T5Config(**SIZE | {"vocab_size": vocab_size}))


def arguments(folder, cls=TrainingArguments, **options):
    usual = dict(
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=3, logging_steps=1,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-2, dataloader_pin_memory=False,
    )  # fmt: skip
    return cls(str(folder), **usual | options)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Sixty paragraphs of the sample as a prepared folder, under ByT5's tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    tokenizer = load_tokenizer(byte_t5(folder / "stock"))
    tokenizer.save(folder / "tokenizer")
    with gzip.open(sample_path("fr"), "rt", encoding="utf-8") as file:
        documents = [tokenizer.encode(json.loads(line)["text"]) for line, _ in zip(file, range(60))]
    return write_corpus(folder, documents, info=tokenizer.info)


class Recorder:
    """A collator that keeps the batches it makes."""

    def __init__(self, collate):
        self.collate, self.batches = collate, []

    def __call__(self, features):
        self.batches.append(self.collate(features))
        return self.batches[-1]


@pytest.mark.parametrize("given", ["text", "pieces"])
def test_three_steps_of_trainer_with_the_collator(tmp_path, given):
    stock = AutoTokenizer.from_pretrained(sentencepiece(tmp_path / "tokenizer"))
    collator = DataCollatorForUL2(stock, max_tokens=64)
    data = Dataset.from_dict({"text": ["le noyau de un paquet, pour le noyau"] * 12})
    if given == "pieces":
        data = data.map(collator.pieces, batched=True, remove_columns=data.column_names)
    trainer = Trainer(
        model(collator.tokenizer.info.vocab_size),
        arguments(tmp_path / "run", remove_unused_columns=given == "pieces"),
        train_dataset=data,
        data_collator=collator,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert saved.convert_tokens_to_ids(["[R]", "[S]", "[X]"]) == list(collator.tokenizer.info.mode_ids.values())


def test_a_column_that_trainer_drops_is_named(tmp_path, shards):
    data = [{"text": "le noyau", "index": number} for number in range(4)]  # not of `datasets`: dropped by row
    collator = DataCollatorForUL2(shards.folder / "tokenizer")
    trainer = Trainer(model(512), arguments(tmp_path), train_dataset=data, data_collator=collator)
    with pytest.raises(DataError, match=r"neither input_ids nor text, but nothing.*remove_unused_columns=False"):
        trainer.train()


def test_trainer_continues_by_position(tmp_path, shards):
    """UL2Examples: four steps in one go, and two and two, give the same batches and weights."""

    def run(folder, resume=False):
        examples = UL2Examples(shards, max_tokens=64, num_examples=64)
        held_out = UL2Examples(shards.folder, max_tokens=64, split="validation", num_examples=8)
        recorder = Recorder(examples.collate)
        trainer = Seq2SeqTrainer(
            model(examples.stream.info.vocab_size),
            arguments(folder, Seq2SeqTrainingArguments, max_steps=4, save_strategy="steps", save_steps=2),
            train_dataset=examples,
            eval_dataset=held_out,
            data_collator=recorder,
        )
        trainer.train(resume_from_checkpoint=resume or None)
        batches = [batch["labels"].tolist() for batch in recorder.batches]
        first, second = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
        assert first == second
        return batches, trainer.model.state_dict(), first

    whole, weights, loss = run(tmp_path / "run")
    rest, again, same = run(tmp_path / "run", resume=str(tmp_path / "run/checkpoint-2"))
    assert rest[:2] == whole[2:4]  # accelerate reads one batch ahead
    assert loss == same
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_trainer_continues_an_endless_dataset(tmp_path, shards):
    def run(resume=False, position=0):
        dataset = UL2Dataset(shards, max_tokens=64, batch_size=4, position=position)
        recorder = Recorder(dataset.collate)
        trainer = Trainer(
            model(dataset.examples.stream.info.vocab_size),
            arguments(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2, ignore_data_skip=True),
            train_dataset=dataset,
            data_collator=recorder,
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return [batch["labels"].tolist() for batch in recorder.batches], trainer.model.state_dict()

    whole, weights = run()
    rest, again = run(resume=str(tmp_path / "run/checkpoint-2"), position=2 * 4)
    assert rest[:2] == whole[2:4]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_snippets_of_the_page_run(tmp_path, shards, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentencepiece(Path("google/t5-v1_1-small"))
    model(512).save_pretrained("google/t5-v1_1-small")
    Path("my_text.jsonl").write_text('{"text": "le noyau de un paquet, pour le noyau"}\n' * 20)
    Path("shards").symlink_to(shards.folder)
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    names: dict = {}
    for snippet in snippets:
        smaller = snippet.replace("max_steps=1000", "max_steps=2, use_cpu=True").replace(
            "max_tokens=512", "max_tokens=64"
        )
        exec(compile(smaller, PAGE.name, "exec"), names)
