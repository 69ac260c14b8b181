"""A tag for each word of a text: named entities, parts of speech."""

from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from fat5.errors import DataError
from fat5.tasks.finetune.classes import check_classes, class_weights, unseen_label
from fat5.tasks.finetune.examples import ExampleSet, Form, refuse_cut
from fat5.tasks.finetune.table import Table


class Tagging(Form):
    """Columns `tokens` and `tags`, lists of equal length. The first token of a word carries its tag; a text longer than
    `max_source_tokens` becomes several examples, so that no word is lost.
    """

    kind: ClassVar = "entities"
    model: ClassVar = "ForTokenClassification"
    pipeline: ClassVar = "token-classification"

    def learn(self, table: Table) -> None:
        """The tags, O first, then in alphabetical order."""
        found = {tag for tags in self.references(table) for tag in tags}
        self.label_names = sorted(found, key=lambda tag: (tag != "O", tag))
        check_classes(self.label_names, self.config.data.columns.tags, "tags", table)
        self.weights(table)

    def inputs(self, table: Table) -> list[str]:
        """The words with spaces between them."""
        return [" ".join(words) for words in self._lists(table, self.config.data.columns.tokens)]

    def references(self, table: Table) -> list[Any]:
        columns = self.config.data.columns
        words, tags = self._lists(table, columns.tokens), self._lists(table, columns.tags)
        for index, (some, others) in enumerate(zip(words, tags, strict=True)):
            if len(some) != len(others):
                raise DataError(
                    f"{len(some)} tokens and {len(others)} tags", where=table.where(index), hint="Give each token a tag"
                )
        return tags

    def encode(self, table: Table) -> ExampleSet:
        """Windows of whole words. An example's note is the (word, place) of each word in it.

        Raises:
            DataError: lists of different lengths, or a tag that the model does not have.
        """
        number = {name: index for index, name in enumerate(self.label_names)}
        all_words, all_tags = self._lists(table, self.config.data.columns.tokens), self.references(table)
        eos, most = self.tokenizer.info.eos_id, self.config.data.max_source_tokens - 1
        inputs: list[list[int]] = []
        targets: list[list[float]] = []
        rows: list[int] = []
        notes: list[Any] = []
        long = []
        for index, (words, tags) in enumerate(zip(all_words, all_tags, strict=True)):
            for tag in tags:
                if tag not in number:
                    raise unseen_label(tag, self.label_names, table.where(index))
            encoded = self._pieces(words)
            if not any(encoded):
                raise DataError("the tokens encode to none of the model's", where=table.where(index), hint="Remove it")
            if any(len(piece) > most for piece in encoded):
                long.append(index)
            for first, pieces in _windows(encoded, most):
                ids: list[int] = []
                labels: list[float] = []
                places = []
                for word, piece in enumerate(pieces, first):
                    if piece:
                        places.append((word, len(ids)))
                        labels += [number[tags[word]], *[-100] * (len(piece) - 1)]
                        ids += piece
                inputs.append([*ids, eos])
                targets.append([*labels, -100])
                rows.append(index)
                notes.append(places)
        if self.config.data.too_long == "refuse":
            refuse_cut([table.where(index) for index in long], most, "source")
        return ExampleSet.of(inputs, targets, table.parts, rows=rows, notes=notes, cut=len(long))

    def weights(self, table: Table) -> list[float] | None:
        """The weight of each tag, scaled so that the words' mean weight is 1; None if all are equal."""
        counts = Counter(tag for tags in self.references(table) for tag in tags)
        return class_weights(self.config.class_weights, self.label_names, counts)

    def predictions(self, logits: Tensor, places: list[tuple[int, int]]) -> tuple[list[tuple[int, str]], float]:
        """(T, C) of one example → the tag of each word in it, and the least probability among them."""
        best = torch.softmax(logits.float(), dim=-1).max(dim=-1)
        indices, shares = best.indices.tolist(), best.values.tolist()
        tags = [(word, self.label_names[indices[place]]) for word, place in places]
        return tags, min((shares[place] for _, place in places), default=1.0)

    def _pieces(self, words: list[str]) -> list[list[int]]:
        """The token ids of each word; none for a word that the tokenizer removes."""
        text = " ".join(words)
        ends, at = [], 0
        for word in words:
            at += len(word) + 1
            ends.append(at)
        [(ids, offsets)] = self.tokenizer.encode_with_offsets([text])
        pieces: list[list[int]] = [[] for _ in words]
        place = 0
        for token, (begin, end) in zip(ids, offsets, strict=True):
            # A token may begin with the space before its word, so its last letter says whose it is.
            while place < len(words) - 1 and max(begin, end - 1) >= ends[place]:
                place += 1
            pieces[place].append(token)
        return pieces

    def _lists(self, table: Table, column: str) -> list[list[str]]:
        values = table.column(column)
        for index, value in enumerate(values):
            fits = (
                isinstance(value, list)
                and value
                and all(isinstance(one, str | int) and not isinstance(one, bool) for one in value)
            )
            if not fits or (column == self.config.data.columns.tags and "" in value):
                raise table.odd(index, column, "Give a list of words (tokens) and one of tags")
        return [[str(one) for one in value] for value in values]


def _windows(pieces: list[list[int]], most: int) -> list[tuple[int, list[list[int]]]]:
    """(first word, token ids of each word) of runs of words with at most `most` tokens together; a word alone has its
    end cut off.
    """
    windows: list[tuple[int, list[list[int]]]] = []
    filled = most + 1
    for index, piece in enumerate(pieces):
        piece = piece[:most]
        if filled + len(piece) > most:
            windows.append((index, []))
            filled = 0
        windows[-1][1].append(piece)
        filled += len(piece)
    return windows
