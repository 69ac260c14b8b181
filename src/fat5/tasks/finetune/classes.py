"""A class or a number for each text, or pair of texts."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fat5.errors import DataError
from fat5.tasks.finetune.examples import ExampleSet, Form, cut_to, refuse_cut, refuse_no_tokens
from fat5.tasks.finetune.table import Table
from fat5.tasks.finetune.text import check_prefix, encode_all

MOST_CLASSES = 1 << 16
LARGEST_NUMBER = 1e15
"""Of a regression: the squares of larger errors, summed, overflow float32."""

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


class Classification(Form):
    """Columns `text`, `text_pair` (optional) and `label`, a name or a whole number."""

    kind: ClassVar = "classification"
    model: ClassVar = "ForSequenceClassification"
    pipeline: ClassVar = "text-classification"

    def learn(self, table: Table) -> None:
        """The classes: whole numbers in their order, names in alphabetical order.

        Raises:
            DataError: fewer than two classes, more than `MOST_CLASSES`, or a weight for a class that there is not.
        """
        found = set(self.references(table))
        numbers = all(WHOLE_NUMBER.fullmatch(label) for label in found)
        names = sorted(found, key=lambda label: (int(label), label)) if numbers else sorted(found)
        check_classes(names, self.config.data.columns.label, "labels", table)
        self.label_names = names
        self.weights(table)

    def inputs(self, table: Table) -> list[str]:
        """The text, and its pair after a tab."""
        columns, prefix = self.config.data.columns, self.config.data.prefix
        texts = table.texts(columns.text)
        if columns.text_pair is not None:
            texts = [f"{one}\t{other}" for one, other in zip(texts, table.texts(columns.text_pair), strict=True)]
        return [prefix + text for text in texts]

    def references(self, table: Table) -> list[Any]:
        """The labels, as text."""
        column = self.config.data.columns.label
        labels = []
        for index, value in enumerate(table.column(column)):
            if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
                raise table.odd(
                    index, column, "A label is a name or a whole number; other numbers are --task regression"
                )
            labels.append(str(value))
        return labels

    def encode(self, table: Table) -> ExampleSet:
        """One example a row: the text and EOS, or two texts with EOS after each.

        Raises:
            DataError: an empty text, a label that the model does not have, or a text that is too long and
                `too_long` says refuse.
        """
        labels = self._targets(table)
        columns, data, eos = self.config.data.columns, self.config.data, self.tokenizer.info.eos_id
        check_prefix(self.config, self.tokenizer)
        first = encode_all(self.tokenizer, [data.prefix + text for text in table.texts(columns.text)])
        refuse_no_tokens(first, table.where, columns.text)
        pairs = None
        if columns.text_pair is not None:
            pairs = encode_all(self.tokenizer, table.texts(columns.text_pair))
            refuse_no_tokens(pairs, table.where, columns.text_pair)
        rows, long = [], []
        for index, ids in enumerate(first):
            end, most = [eos], data.max_source_tokens
            if pairs is not None:
                pair = pairs[index].tolist()
                end = [eos, *pair[: max(most // 2, most - 2 - len(ids))], eos]  # half the room, or what the text leaves
            row, was_cut = cut_to(ids.tolist(), most, end)
            if was_cut or (pairs is not None and len(end) - 2 < len(pair)):
                long.append(index)
            rows.append(row)
        if data.too_long == "refuse":
            refuse_cut([table.where(index) for index in long], data.max_source_tokens, "source")
        kind = np.float32 if self.kind == "regression" else np.int64
        return ExampleSet.of(rows, [[label] for label in labels], table.parts, dtype=kind, cut=len(long))

    def weights(self, table: Table) -> list[float] | None:
        """The weight of each class, scaled so that the examples' mean weight is 1; None if all are equal."""
        return class_weights(self.config.class_weights, self.label_names, Counter(self.references(table)))

    def predictions(self, logits: Tensor) -> tuple[list[Any], list[float]]:
        """(N, C) → the likeliest classes and their probabilities."""
        best = torch.softmax(logits.float(), dim=-1).max(dim=-1)
        return [self.label_names[index] for index in best.indices.tolist()], best.values.tolist()

    def _targets(self, table: Table) -> list[float]:
        number = {name: index for index, name in enumerate(self.label_names)}
        targets: list[float] = []
        for index, label in enumerate(self.references(table)):
            if label not in number:
                raise unseen_label(label, self.label_names, table.where(index))
            targets.append(number[label])
        return targets


class Regression(Classification):
    """Columns `text`, `text_pair` (optional) and `label`, a number."""

    kind: ClassVar = "regression"

    def learn(self, table: Table) -> None:
        """Nothing: the targets are numbers."""

    def references(self, table: Table) -> list[Any]:
        column = self.config.data.columns.label
        numbers = []
        for index, value in enumerate(table.column(column)):
            try:
                number = float("nan" if isinstance(value, bool) or value is None else value)
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            if not abs(number) <= LARGEST_NUMBER:
                raise table.odd(index, column, f"Regression needs a number of at most {LARGEST_NUMBER:g}")
            numbers.append(number)
        return numbers

    def weights(self, table: Table) -> list[float] | None:
        return None

    def predictions(self, logits: Tensor) -> tuple[list[Any], list[float]]:
        """(N, 1) → the numbers; they have no scores."""
        return logits.float()[:, 0].tolist(), []

    def _targets(self, table: Table) -> list[float]:
        # -100 marks a place without a target, so the number -100 becomes its neighbour in float32.
        neighbour = float(np.nextafter(np.float32(-100), np.float32(0)))
        return [neighbour if np.float32(number) == -100 else number for number in self.references(table)]


def unseen_label(label: str, names: list[str], where: str) -> DataError:
    """The error for a label that the model does not have."""
    near = get_close_matches(label, names, n=1)
    shown = ", ".join(names[:10]) + ", …" * (len(names) > 10)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return DataError(
        f"label {label!r:.60} is not one that the model learned, which are {shown}",
        where=where,
        hint=f"{meant}Mend or remove it, or add training examples with it",
    )


def check_classes(names: list[str], column: str, what: str, table: Table) -> None:
    """Raises DataError unless there are from 2 to `MOST_CLASSES` labels or tags."""
    if not 2 <= len(names) <= MOST_CLASSES:
        raise DataError(
            f"column {column!r} has {len(names):,} different {what} in {len(table):,} training examples",
            where=table.where(0).rpartition(", row ")[0],
            hint=f"Give examples of at least two, or name another column; {MOST_CLASSES:,} is the most",
        )


def class_weights(given: Any, names: list[str], counts: Mapping[str, int]) -> list[float] | None:
    """A weight for each class, scaled so that the mean over the examples, `counts` of each class, is 1.

    Raises:
        DataError: a weight is given for an unknown label, or is not above 0.
    """
    if given is None:
        return None
    if given == "balanced":
        weights = [1.0 / max(counts[name], 1) for name in names]
    else:
        given = {str(label): weight for label, weight in given.items()}
        for label, weight in given.items():
            if label not in names:
                raise unseen_label(label, names, "class_weights")
            if not 0 < weight < math.inf:
                raise DataError(f"{label} has weight {weight}", where="class_weights", hint="Give a number above 0")
        weights = [float(given.get(name, 1.0)) for name in names]
    examples = [counts[name] for name in names]
    mean = sum(weight * count for weight, count in zip(weights, examples, strict=True)) / sum(examples)
    return [weight / mean for weight in weights]
