"""Answers to questions, as spans of a context (SQuAD's form)."""

import unicodedata
from typing import Any, ClassVar

import torch
from torch import Tensor

from fat5.errors import DataError
from fat5.tasks.finetune.examples import ExampleSet, Form, refuse_no_tokens
from fat5.tasks.finetune.table import Table

LONGEST_ANSWER = 64
"""Tokens; a span that is longer is no candidate."""

CANDIDATES = 20
"""Likeliest starts and ends that are combined."""


class Answers(Form):
    """Columns `question`, `context` and `answers` ({text, answer_start}). A context longer than the room becomes
    several windows; EOS stands for "no answer here".
    """

    kind: ClassVar = "answers"
    model: ClassVar = "ForQuestionAnswering"
    pipeline: ClassVar = "question-answering"

    may_be_missing = False
    """Whether a question may have no answer; learned from the training rows"""

    def learn(self, table: Table) -> None:
        """Whether some questions have no answer; if so, the model may give none."""
        self.may_be_missing = not all(self.references(table))

    def keys(self, table: Table) -> list[str]:
        return table.texts(self.config.data.columns.context)  # questions on one context stay together

    def inputs(self, table: Table) -> list[str]:
        return table.texts(self.config.data.columns.question)

    def references(self, table: Table) -> list[Any]:
        """The right answers of each question; an empty list where there is none."""
        return [[text for text, _ in spans] for spans in self._spans(table)]

    def encode(self, table: Table) -> ExampleSet:
        """Windows of the context behind the question. An example's note is (characters of each token of the context,
        its first place).

        Raises:
            DataError: an answer that does not stand where its answer_start says, or a question that leaves no room.
        """
        data, eos = self.config.data, self.tokenizer.info.eos_id
        contexts = table.texts(data.columns.context)
        spans = self._spans(table)
        inputs: list[list[int]] = []
        targets: list[list[float]] = []
        rows: list[int] = []
        notes: list[Any] = []
        long = []
        questions = self.tokenizer.encode_with_offsets(self.inputs(table))
        encoded = self.tokenizer.encode_with_offsets(contexts)
        refuse_no_tokens([ids for ids, _ in questions], table.where, data.columns.question)
        refuse_no_tokens([ids for ids, _ in encoded], table.where, data.columns.context)
        for index, (question, context) in enumerate(zip(questions, encoded, strict=True)):
            head = [*question[0], eos]
            room = data.max_source_tokens - len(head) - 1
            ids, offsets = context[0], _with_marks(context[1], contexts[index])
            if room < 1 or (len(ids) > room and room <= data.stride):
                raise DataError(
                    f"the question has {len(question[0]):,} tokens and leaves {max(room, 0):,} for the context",
                    where=table.where(index),
                    hint="Raise max_source_tokens, lower stride, or shorten the question",
                )
            wanted = None
            if spans[index]:
                wanted = _token_span(spans[index][0], offsets)
                if wanted is None:
                    what = f"the tokenizer removes every character of the answer {spans[index][0][0]!r:.60}"
                    raise DataError(what, where=table.where(index), hint="Remove the row")
            found = False
            for start in _starts(len(ids), room, data.stride):
                part = ids[start : start + room]
                none = len(head) + len(part)  # the place of EOS
                inside = wanted is not None and start <= wanted[0] and wanted[1] < start + len(part)
                found = found or inside
                target = [len(head) + place - start for place in wanted] if inside and wanted else [none, none]
                inputs.append([*head, *part, eos])
                targets.append(list(target))
                rows.append(index)
                notes.append((offsets[start : start + len(part)], len(head)))
            if wanted is not None and not found:
                long.append(index)
        if long and data.too_long == "refuse":
            raise DataError(
                f"the answer is longer than a window of the context, the first of {len(long):,} such rows",
                where=table.where(long[0]),
                hint="Raise max_source_tokens, or set too_long to truncate to learn no answer there",
            )
        return ExampleSet.of(inputs, targets, table.parts, rows=rows, notes=notes, cut=len(long))

    def predictions(self, start: Tensor, end: Tensor, note: Any, context: str) -> tuple[str, float, float]:
        """The likeliest span of one window, and the log-probabilities of it and of no answer.

        Args:
            start, end: (L,) logits of the example's tokens.
            note: as `encode` made it.
        """
        offsets, first = note
        starts = torch.log_softmax(start.float(), dim=0).cpu()
        ends = torch.log_softmax(end.float(), dim=0).cpu()
        none = float(starts[-1] + ends[-1])
        inner_starts, inner_ends = starts[first : first + len(offsets)], ends[first : first + len(offsets)]
        best, text = float("-inf"), ""
        if len(offsets):
            count = min(CANDIDATES, len(offsets))
            for one in inner_starts.topk(count).indices.tolist():
                for other in inner_ends.topk(count).indices.tolist():
                    score = float(inner_starts[one] + inner_ends[other])
                    if one <= other < one + LONGEST_ANSWER and score > best:
                        best, text = score, context[offsets[one][0] : offsets[other][1]].strip()
        return text, best, none

    def _spans(self, table: Table) -> list[list[tuple[str, int]]]:
        """(text, first character) of the answers of each question, checked against the context."""
        columns = self.config.data.columns
        contexts = table.texts(columns.context)
        found = []
        for index, value in enumerate(table.column(columns.answers)):
            texts, starts = (value.get(key) if isinstance(value, dict) else None for key in ("text", "answer_start"))
            if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
                raise table.odd(index, columns.answers, "Give {text: [...], answer_start: [...]}, as SQuAD does")
            for text, start in zip(texts, starts, strict=True):
                stands = isinstance(text, str) and type(start) is int and start >= 0 and text.strip()
                if not stands or contexts[index][start : start + len(text)] != text:
                    raise DataError(
                        f"the answer {text!r:.60} does not stand at character {start!r:.20} of the context",
                        where=table.where(index),
                        hint=_where_it_stands(text, contexts[index]),
                    )
            found.append(list(zip(texts, starts, strict=True)))
        return found


def _where_it_stands(text: Any, context: str) -> str:
    """What to do about an answer that is not where its answer_start says."""
    place = context.find(text) if isinstance(text, str) and text.strip() else -1
    if place >= 0:
        return f"It stands at {place}: answer_start counts characters from 0"
    return "An answer is a text of the context, letter for letter; without any, text and answer_start are empty lists"


def _token_span(span: tuple[str, int], offsets: list[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last token that touch the characters of an answer."""
    begin, end = span[1], span[1] + len(span[0])
    touched = [index for index, (one, other) in enumerate(offsets) if one < end and other > begin]
    return (touched[0], touched[-1]) if touched else None


def _with_marks(offsets: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """Characters of tokens, with the combining marks that a normalizer composed with their last letter, or removed."""
    ends = [end for _, end in offsets]
    for index, (begin, _) in enumerate([*offsets[1:], (len(text), 0)]):
        while ends[index] < begin and unicodedata.combining(text[ends[index]]):
            ends[index] += 1
    return [(begin, end) for (begin, _), end in zip(offsets, ends, strict=True)]


def _starts(length: int, room: int, stride: int) -> list[int]:
    """First tokens of windows of `room` tokens that share `stride`."""
    return list(range(0, max(length - stride, 1), room - stride)) if length > room else [0]
