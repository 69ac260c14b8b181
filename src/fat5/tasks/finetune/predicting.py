"""Predictions for a split, in batches by length, kept in a file as they come: a run that is killed goes on there."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from fat5.data import BatchConfig, Tokenizer
from fat5.files import parse_json, write_atomically
from fat5.generate.decoding import Decoder
from fat5.generate.replay import pays
from fat5.tasks.finetune.adapter import merged
from fat5.tasks.finetune.config import FinetuneConfig
from fat5.tasks.finetune.examples import ExampleSet, Form
from fat5.tasks.finetune.model import weights_sha256
from fat5.tasks.finetune.splits import Split
from fat5.train.evaluation import Scorer
from fat5.train.precision import Precision

Prediction = tuple[int, Any, float | None]
"""Row of the table, what was predicted for it, and its score (None if there is none)."""


def predict(
    config: FinetuneConfig,
    form: Form,
    tokenizer: Tokenizer,
    batch: BatchConfig,
    scorer: Scorer,
    split: Split,
    *,
    most: int | None = None,
    file: "PredictionFile | None" = None,
    show: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """What a model says of a split's rows, in their order.

    Args:
        scorer: its forward is a `HeadObjective`, or its compiled form, if the task is not one of texts.
        most: of texts, take at most this many rows, the first ones.
        file: of texts, keeps predictions as they come, and has those of an earlier attempt.
        show: gets the number of examples that are done, and of all, after each batch.
    """
    show = show or (lambda done, total: None)
    model, examples = scorer.model, split.examples
    training = model.training
    model.eval()
    try:
        if form.kind != "text":
            contexts = split.table.texts(config.data.columns.context) if form.kind == "answers" else None
            pad = tokenizer.info.pad_id
            found: list[Any] = []
            show(0, len(examples))
            for some in read_logits(scorer, examples, batch, pad, form, contexts):
                found += some
                show(len(found), len(examples))
            lengths = [len(tags) for tags in form.references(split.table)] if form.kind == "entities" else []
            return sorted(of_rows(found, examples, form, lengths), key=lambda one: one[0])
        total = len(examples) if most is None else min(most, len(examples))
        rows = np.arange(total) if file is None else file.rest(total)
        plain = replace(scorer, model=merged(model).eval())
        made: list[Prediction] = []
        show(total - len(rows), total)
        for written in write_texts(
            plain, examples, tokenizer, rows=rows, batch_size=config.predict_batch, num_beams=config.num_beams,
            max_new_tokens=config.max_new_tokens or config.data.max_target_tokens,
            cuda_graphs=config.cuda_graphs is not False,
        ):  # fmt: skip
            made += written
            if file is not None:
                file.add(written)
            show(total - len(rows) + len(made), total)
        return sorted(made if file is None else file.found.values(), key=lambda one: one[0])
    finally:
        model.train(training)


@torch.no_grad()
def write_texts(
    scorer: Scorer,
    examples: ExampleSet,
    tokenizer: Tokenizer,
    *,
    rows: np.ndarray | None = None,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int,
    cuda_graphs: bool = True,
) -> Iterator[list[Prediction]]:
    """Generated texts, a batch at a time, long inputs first.

    Args:
        scorer: its model is a plain `FAT5ForConditionalGeneration` in evaluation mode.
        rows: examples to write; all if None.
        cuda_graphs: on a GPU, replay recorded decoding steps.
    """
    info, device = tokenizer.info, scorer.precision.device
    chosen = np.arange(len(examples)) if rows is None else rows
    order = chosen[np.argsort(-examples.input_lengths[chosen], kind="stable")]
    loop, replays = Decoder(scorer.model), cuda_graphs and pays(device, -(-len(order) // batch_size))
    for start in range(0, len(order), batch_size):
        scorer.before_batch()
        indices = order[start : start + batch_size].tolist()
        texts = [torch.from_numpy(examples.input(index).astype(np.int64)) for index in indices]
        ids = pad_sequence(texts, batch_first=True, padding_value=info.pad_id).to(device)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(device)
        with scorer.precision.autocast():
            answers = loop.generate(
                ids, mask, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False,
                eos_token_id=info.eos_id, pad_token_id=info.pad_id, cuda_graph=replays,
            ).tolist()  # fmt: skip
        found: list[Prediction] = []
        for index, answer in zip(indices, answers, strict=True):
            kept = answer[1:]
            kept = kept[: kept.index(info.eos_id)] if info.eos_id in kept else kept
            text = tokenizer.decode([token for token in kept if token != info.pad_id], skip_special_tokens=True)
            found.append((int(examples.rows[index]), text.strip(), None))
        yield found


@torch.no_grad()
def read_logits(
    scorer: Scorer, examples: ExampleSet, config: BatchConfig, pad_id: int, form: Any, contexts: list[str] | None
) -> Iterator[list[Any]]:
    """What a head says of each example, a batch at a time: (example, prediction, score or scores).

    Args:
        scorer: its forward is a `HeadObjective`, or its compiled form.
        form: the task's form, whose `predictions` reads the logits.
        contexts: of question answering, for each row of the table.
    """
    for batch in examples.batches(config, pad_id):
        scorer.before_batch()
        with scorer.precision.autocast():
            inputs = batch.to(scorer.precision.device).model_inputs()
            logits = scorer.forward(**inputs, per_token=True).logits.cpu()
        indices = batch.piece[: batch.num_examples].tolist()
        if form.kind in ("classification", "regression"):
            values, scores = form.predictions(logits[: len(indices)])
            yield list(zip(indices, values, scores or [None] * len(indices), strict=True))
            continue
        ends = batch.cu_seqlens.tolist()
        found: list[Any] = []
        for place, index in enumerate(indices):
            part, note = logits[ends[place] : ends[place + 1]], examples.notes[index]
            if form.kind == "entities":
                found.append((index, *form.predictions(part, note)))
            else:
                context = (contexts or [])[int(examples.rows[index])]
                text, score, none = form.predictions(part[:, 0], part[:, 1], note, context)
                found.append((index, text, (score, none)))
        yield found


def of_rows(found: list[Any], examples: ExampleSet, form: Any, lengths: list[int]) -> list[Prediction]:
    """Predictions of examples as those of rows: the tags of all windows together (`lengths` are the words of each row),
    the best answer of all windows.
    """
    if form.kind == "entities":
        tags = [[form.label_names[0]] * length for length in lengths]  # O if there is one, for a word without tokens
        least = [1.0] * len(lengths)
        for index, some, score in found:
            row = int(examples.rows[index])
            least[row] = min(least[row], score)
            for word, tag in some:
                tags[row][word] = tag
        return [(row, tags[row], least[row]) for row in range(len(lengths))]
    if form.kind == "answers":
        best: dict[int, tuple[float, str]] = {}
        for index, text, (score, none) in found:
            row = int(examples.rows[index])
            # A window's spans are measured against its own "no answer"; the surest window counts.
            if row not in best or score - none > best[row][0]:
                best[row] = (score - none, text)
        rows: list[Prediction] = []
        for row, (margin, text) in sorted(best.items()):
            gives_none = form.may_be_missing and margin < 0
            rows.append((row, "" if gives_none else text, margin))
        return rows
    return [(int(examples.rows[index]), value, score) for index, value, score in found]


def prediction_key(
    settings: FinetuneConfig, split: Split, model: Any, tokenizer: Tokenizer, precision: Precision
) -> str:
    """All that predictions depend on: those of another key are not taken over."""
    data = settings.data
    how = [data.prefix, data.max_source_tokens, data.max_target_tokens, settings.num_beams, settings.max_new_tokens]
    what = [split.table.sha256(), weights_sha256(model), tokenizer.info.sha256, settings.task, asdict(data.columns)]
    return json.dumps([*what, *how, precision.name])


class PredictionFile:
    """Predictions as they come, a line a row, under a key that says which model and data they belong to.

    A file of another key, or a damaged one, is begun anew.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.found: dict[int, Prediction] = {}
        if path.is_file():
            self._read()

    def rest(self, total: int) -> np.ndarray:
        """Rows that are still to be predicted."""
        return np.array([row for row in range(total) if row not in self.found], np.int64)

    def add(self, some: list[Prediction]) -> None:
        """Appends predictions; a kill loses none of them when this has returned."""
        new = not self.path.is_file()
        with open(self.path, "a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps({"key": self.key}) + "\n")
            for row, value, score in some:
                file.write(json.dumps([row, value, score], ensure_ascii=False) + "\n")
        self.found |= {prediction[0]: prediction for prediction in some}

    def _read(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        kept = []
        try:
            if parse_json(lines[0]) != {"key": self.key}:
                raise ValueError("another key")
            for line in lines[1:-1]:  # behind the last line break a kill may have left a part of a line
                row, value, score = parse_json(line)
                self.found[int(row)] = (int(row), value, score)
                kept.append(line)
        except (ValueError, TypeError):
            self.found = {}
            self.path.unlink()
            return
        write_atomically(self.path, b"\n".join([lines[0], *kept]) + b"\n")
