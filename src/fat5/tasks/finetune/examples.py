"""Forms of tasks, which make examples of rows; the encoded examples, their endless order, and their packed batches.

An example has inputs (encoder tokens) and targets: decoder tokens, a class, a number, a tag for each input token, or
the first and last token of an answer. `PackedBatch.labels` holds the targets one after another, whatever they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fat5.data import BatchConfig, PackedBatch, PackedLoader, Tokenizer
from fat5.data.examples import kernels
from fat5.data.examples.denoisers import split_seed
from fat5.data.examples.packing import packs_of_rank
from fat5.errors import DataError
from fat5.tasks.finetune.config import FinetuneConfig
from fat5.tasks.finetune.table import Table

ORDER = 7 << kernels.DOMAIN_SHIFT
"""The domain of the random numbers that order a pass; the stream of pretraining has others."""


class Form(ABC):
    """A form of task, for one configuration and tokenizer.

    Attributes:
        kind: of its metrics (`fat5.tasks.metrics.KINDS`), and of its loss.
        model: the model's class without its family, such as ForConditionalGeneration.
        pipeline: the hub's name of the task, by which it chooses the widget.
        label_names: the classes or tags in the order of the model's outputs; empty where there are none.
    """

    kind: ClassVar[str]
    model: ClassVar[str]
    pipeline: ClassVar[str]

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.label_names: list[str] = []

    def learn(self, table: Table) -> None:  # noqa: B027  (most have nothing to learn)
        """Takes from the training rows what the other splits are read by: classes, tags."""

    def keys(self, table: Table) -> list[str]:
        """What decides which rows stay together when some are held out."""
        return self.inputs(table)

    @abstractmethod
    def inputs(self, table: Table) -> list[str]:
        """What the model reads of each row, for a person."""

    @abstractmethod
    def references(self, table: Table) -> list[Any]:
        """What is right for each row, as the metrics compare it."""

    @abstractmethod
    def encode(self, table: Table) -> ExampleSet:
        """The examples of the rows.

        Raises:
            DataError: a row that does not fit, with its place.
        """

    def weights(self, table: Table) -> list[float] | None:
        """The weight of each class in the loss; None if all are equal, or there are no classes."""
        return None


class Chosen(NamedTuple):
    """Examples of one batch, by index."""

    piece: np.ndarray


@dataclass
class ExampleSet:
    """Encoded examples.

    Attributes:
        inputs: int32, the encoder tokens of all examples. input_ends: int64 (n,), where each ends.
        targets: int64, or float32 for numbers. target_ends: int64 (n,).
        rows: int64 (n,), the table's row of each example; a long context makes several examples of one row.
        part: int64 (n,), index of the row's file.
        cut: examples whose input or target was too long.
        notes: what a task keeps of each example for its predictions.
    """

    inputs: np.ndarray
    input_ends: np.ndarray
    targets: np.ndarray
    target_ends: np.ndarray
    rows: np.ndarray
    part: np.ndarray
    cut: int = 0
    notes: list[Any] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        inputs: Sequence[Sequence[int]],
        targets: Sequence[Sequence[float]],
        part: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        dtype: Any = np.int64,
        cut: int = 0,
        notes: list[Any] | None = None,
    ) -> ExampleSet:
        """From lists of each example."""
        owner = np.arange(len(inputs)) if rows is None else np.array(rows, np.int64)
        return cls(
            np.concatenate([np.array(row, np.int32) for row in inputs]) if inputs else np.empty(0, np.int32),
            np.cumsum([len(row) for row in inputs], dtype=np.int64),
            np.concatenate([np.array(row, dtype) for row in targets]) if targets else np.empty(0, dtype),
            np.cumsum([len(row) for row in targets], dtype=np.int64),
            owner,
            np.array(part, np.int64)[owner],
            cut,
            notes or [],
        )

    def __len__(self) -> int:
        return len(self.input_ends)

    @property
    def input_lengths(self) -> np.ndarray:
        """int64 (n,)."""
        return np.diff(self.input_ends, prepend=0)

    @property
    def target_lengths(self) -> np.ndarray:
        """int64 (n,)."""
        return np.diff(self.target_ends, prepend=0)

    def input(self, index: int) -> np.ndarray:
        """Encoder tokens of one example."""
        return self.inputs[self.input_ends[index - 1] if index else 0 : self.input_ends[index]]

    def target(self, index: int) -> np.ndarray:
        """Targets of one example."""
        return self.targets[self.target_ends[index - 1] if index else 0 : self.target_ends[index]]

    def batch(self, indices: np.ndarray, config: BatchConfig, pad_id: int) -> PackedBatch:
        """The packed batch of these examples, `packs_per_micro_batch` packs long."""
        packs, count = config.packs_per_micro_batch, len(indices)
        input_ids = np.full(packs * config.encoder_tokens, pad_id, np.int64)
        labels = np.full(packs * config.decoder_tokens, -100, self.targets.dtype)
        most = packs * config.examples_per_pack
        ends = np.zeros((2, most + 1), np.int32)
        for n, index in enumerate(indices, 1):
            for side, room, values in ((0, input_ids, self.input(index)), (1, labels, self.target(index))):
                ends[side, n] = ends[side, n - 1] + len(values)
                room[ends[side, n - 1] : ends[side, n]] = values
        ends[:, count + 1 :] = ends[:, count : count + 1]
        sides = (input_ids, ends[0].copy()), (labels, ends[1].copy())
        longest = int(self.input_lengths.max()), int(self.target_lengths.max())
        return PackedBatch.of(*sides, longest, self.part[indices], indices, int(ends[0, -1]))

    def batches(self, config: BatchConfig, pad_id: int, rank: int = 0, world_size: int = 1) -> list[PackedBatch]:
        """Every example once, in as few batches as fit; every rank gets as many batches as the others."""
        batches = packs_of_rank(self.input_lengths, self.target_lengths, config, rank, world_size)
        return [self.batch(members, config, pad_id) for members in batches]


class ExampleStream:
    """Positions 0, 1, 2, … of endless training: position p is in pass p // n, and each pass has its own order.

    Args:
        sha256: of the data, by which a checkpoint of other data is told.
    """

    def __init__(self, examples: ExampleSet, seed: int, pad_id: int, sha256: str) -> None:
        self.examples, self.seed, self.pad_id, self.sha256 = examples, seed, pad_id, sha256

    @property
    def max_lengths(self) -> tuple[int, int]:
        """The longest inputs and targets."""
        return int(self.examples.input_lengths.max()), int(self.examples.target_lengths.max())

    def resolve(self, positions: np.ndarray) -> Chosen:
        """The examples at stream positions (int64)."""
        low, high = split_seed(self.seed)
        size = len(self.examples)
        turns, passes = positions % size, positions // size
        chosen = np.empty(positions.size, np.int64)
        for one in np.unique(passes):
            words = kernels.philox(int(one) & kernels.MASK32, int(one) >> 32, 0, ORDER, low, high)
            for place in np.flatnonzero(passes == one):
                chosen[place] = kernels.permute(int(turns[place]), size, *words)
        return Chosen(chosen)

    def lengths(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encoder and target tokens of the examples at stream positions: two int64 arrays."""
        chosen = self.resolve(positions).piece
        return self.examples.input_lengths[chosen], self.examples.target_lengths[chosen]

    def passes(self, cursor: int) -> list[float]:
        """Passes over the examples, up to a stream position."""
        return [cursor / len(self.examples)]

    def identity(self) -> dict[str, Any]:
        """What the order depends on."""
        return {"data": self.sha256, "seed": self.seed}


class ExampleLoader(PackedLoader):
    """Endless packed batches of a task's examples."""

    def write(self, examples: Any) -> PackedBatch:
        examples_of: ExampleSet = self.stream.examples
        return examples_of.batch(examples.piece, self.config, self.stream.pad_id)


def cut_to(ids: Sequence[int], most: int, end: Sequence[int]) -> tuple[list[int], bool]:
    """At most `most` ids with `end` as the last ones, and whether some were cut off."""
    kept = most - len(end)
    return [*ids[:kept], *end], len(ids) > kept


def refuse_no_tokens(inputs: Sequence[Sized], where: Callable[[int], str], column: str) -> None:
    """Raises DataError for the first text without a token: its characters are all removed by the tokenizer."""
    for index, ids in enumerate(inputs):
        if not len(ids):
            raise DataError(f"column {column!r} encodes to no tokens", where=where(index), hint="Remove the row")


def refuse_cut(wheres: Sequence[str], most: int, side: str) -> None:
    """Raises DataError for the first of the examples that are too long."""
    if wheres:
        raise DataError(
            f"the {side} has more than {most:,} tokens (the first of {len(wheres):,} such rows)",
            where=wheres[0],
            hint=f"Raise max_{side}_tokens, shorten it, or set too_long to truncate",
        )
