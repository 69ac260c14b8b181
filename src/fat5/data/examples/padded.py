"""Padded batches for stock models, from the same examples as the packed ones.

Groups of examples are taken in the stream's order. A group is sorted by both lengths and cut into batches, which are
shuffled. So the examples of a batch have similar lengths, and little is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fat5.data.examples import kernels
from fat5.data.examples.batch import PackedBatch
from fat5.data.examples.loader import Loader, State
from fat5.data.examples.order import PieceStream
from fat5.errors import check_whole

PAD_MULTIPLE = 8
GROUP_BATCHES = 64  # batches of one process in a group


class PaddedBatch(dict[str, torch.Tensor]):
    """Keyword arguments of a stock encoder–decoder, int64: `input_ids` and `attention_mask` (B, L), `labels` (B, M).

    L and M are multiples of 8, or of the collator's `pad_to_multiple_of`; labels are padded with -100. `tokens` holds
    the raw document tokens in the batch.
    """

    tokens: int = 0

    def pin_memory(self) -> PaddedBatch:
        """The batch in page-locked memory."""
        batch = PaddedBatch({name: tensor.pin_memory() for name, tensor in self.items()})
        batch.tokens = self.tokens
        return batch

    def __reduce__(self) -> tuple[Any, ...]:
        """Batches travel from workers as arrays: a tensor's memory must be fetched from a worker that still lives."""
        return _from_arrays, ({name: tensor.numpy() for name, tensor in self.items()}, self.tokens)


def pad(
    inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray], pad_id: int, multiple: int = PAD_MULTIPLE
) -> PaddedBatch:
    """Pads examples (each side int64, any lengths) to the longest of them, rounded up to a multiple."""
    input_ids = np.full((len(inputs), _rounded(inputs, multiple)), pad_id, np.int64)
    mask = np.zeros_like(input_ids)
    labels = np.full((len(targets), _rounded(targets, multiple)), -100, np.int64)
    for row, (source, target) in enumerate(zip(inputs, targets)):
        input_ids[row, : len(source)] = source
        mask[row, : len(source)] = 1
        labels[row, : len(target)] = target
    return PaddedBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
    )


def unpack(batch: PackedBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """The examples of a packed batch: (inputs, targets), int64 views."""
    encoder, decoder = batch.cu_seqlens.tolist(), batch.decoder_cu_seqlens.tolist()
    inputs, labels = batch.input_ids.numpy(), batch.labels.numpy()
    return [
        (inputs[encoder[n] : encoder[n + 1]], labels[decoder[n] : decoder[n + 1]]) for n in range(batch.num_examples)
    ]


class PaddedLoader(Loader[PaddedBatch]):
    """Endless iterable of padded batches for stock models, of `batch_size` examples a process.

    A step of it is one group of batches of similar lengths. `workers` are as in `PackedLoader`.
    """

    def __init__(
        self, stream: PieceStream, batch_size: int, *, rank: int = 0, world_size: int = 1, **workers: Any
    ) -> None:
        check_whole(batch_size, "batch_size")
        super().__init__(stream, batch_size, GROUP_BATCHES, [], rank=rank, world_size=world_size, **workers)
        self.batch_size = batch_size

    def examples(self) -> Iterator[tuple[kernels.Examples, State | None]]:
        batches = GROUP_BATCHES * self.world_size
        step, cursor, first = self.step, int(self._state["cursor"]), self._consumed
        while True:
            positions = np.arange(cursor, cursor + batches * self.batch_size)
            group = self.stream.resolve(positions)
            cursor, step = cursor + positions.size, step + 1
            after = self._state_at(step, cursor, [])
            members = _alike(group.encoder, group.decoder, batches)
            words = kernels.philox(
                step, cursor & kernels.MASK32, cursor >> 32, kernels.GROUPS << kernels.DOMAIN_SHIFT, 0, 0
            )
            for turn in range(first, GROUP_BATCHES):
                chosen = members[kernels.permute(turn * self.world_size + self.rank, batches, *words)]
                yield group.take(chosen), after if turn == GROUP_BATCHES - 1 else None
            first = 0

    def write(self, examples: kernels.Examples) -> PaddedBatch:
        inputs, targets, cu_inputs, cu_targets = self.stream.write(examples)
        batch = pad(np.split(inputs, cu_inputs[1:-1]), np.split(targets, cu_targets[1:-1]), self.stream.info.pad_id)
        batch.tokens = int(examples.length.sum())
        return batch


def _alike(encoder: np.ndarray, decoder: np.ndarray, batches: int) -> np.ndarray:
    """Indices (batches, batch size), each row of similar lengths: bands of one side, sorted by the other."""
    bands = max(int(batches**0.5), 1)
    order = np.argsort(encoder, kind="stable")
    batch_size = order.size // batches
    edges = np.arange(1, bands) * batches // bands * batch_size
    parts = [part[np.argsort(decoder[part], kind="stable")] for part in np.split(order, edges)]
    return np.concatenate(parts).reshape(batches, batch_size)


def _from_arrays(arrays: dict[str, np.ndarray], tokens: int) -> PaddedBatch:
    batch = PaddedBatch({name: torch.from_numpy(array) for name, array in arrays.items()})
    batch.tokens = tokens
    return batch


def _rounded(sides: Sequence[np.ndarray], multiple: int) -> int:
    return -(-max(map(len, sides)) // multiple) * multiple
