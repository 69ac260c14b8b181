"""Batches of packed documents."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from fat5.data.examples import kernels
from fat5.data.examples.config import BatchConfig
from fat5.data.examples.order import PieceStream


@dataclass
class PackedBatch:
    """Packed examples, one after another, at static shapes: T encoder tokens, U decoder tokens, at most N examples.

    Attributes:
        input_ids: int64 (T,), the tail filled with the pad id.
        cu_seqlens: int32 (N+1,), where each example starts in `input_ids`, padded with the last end.
        max_seqlen: the longest encoder side that an example of the run can have.
        labels: int64 (U,), the tail filled with -100.
        decoder_cu_seqlens: int32 (N+1,).
        decoder_max_seqlen: the longest decoder side that an example of the run can have.
        denoiser: int8 (N,), index into the mixture; -1 beyond the last example.
        piece: int64 (N,), global piece id; -1 beyond the last example.
        num_examples: examples in the batch.
        tokens: raw document tokens in the batch, each counted once.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    labels: torch.Tensor
    decoder_cu_seqlens: torch.Tensor
    decoder_max_seqlen: int
    denoiser: torch.Tensor
    piece: torch.Tensor
    num_examples: int
    tokens: int

    @classmethod
    def of(
        cls,
        inputs: tuple[np.ndarray, np.ndarray],
        labels: tuple[np.ndarray, np.ndarray],
        longest: tuple[int, int],
        denoiser: np.ndarray,
        piece: np.ndarray,
        tokens: int,
    ) -> PackedBatch:
        """From the tokens and cu_seqlens of both sides, and what its examples alone have: denoisers and pieces."""
        count, most = piece.size, inputs[1].size - 1
        denoisers, pieces = np.full(most, -1, np.int8), np.full(most, -1, np.int64)
        denoisers[:count], pieces[:count] = denoiser, piece
        input_ids, cu_seqlens, targets, cu_targets, of_denoiser, of_piece = (
            torch.from_numpy(array) for array in (*inputs, *labels, denoisers, pieces)
        )
        return cls(
            input_ids, cu_seqlens, longest[0], targets, cu_targets, longest[1], of_denoiser, of_piece, count, tokens
        )

    @property
    def num_items(self) -> int:
        """Targets that count, by which a loss summed over the batch is divided."""
        return int((self.labels != -100).sum())

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The batch with its tensors on a device.

        Copies to a GPU go through page-locked memory; others would first wait until the GPU is idle.
        """
        to_gpu = torch.device(device).type == "cuda" and self.input_ids.device.type == "cpu"
        tensors = (self.pin_memory() if to_gpu else self)._tensors()
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors}
        return replace(self, **moved)

    def copy_(self, other: PackedBatch) -> None:
        """Copies another batch of the same shapes into the tensors of this one."""
        for name, tensor in (other.pin_memory() if self.input_ids.is_cuda else other)._tensors():
            getattr(self, name).copy_(tensor, non_blocking=True)
        self.num_examples, self.tokens = other.num_examples, other.tokens

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, for copies that overlap with compute."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors()}
        return replace(self, **pinned)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a packed forward pass."""
        names = ("input_ids", "cu_seqlens", "max_seqlen", "labels", "decoder_cu_seqlens", "decoder_max_seqlen")
        return {name: getattr(self, name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """Batches travel from workers as arrays: a tensor's memory must be fetched from a worker that still lives."""
        return self.__dict__ | {name: tensor.numpy() for name, tensor in self._tensors()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: torch.from_numpy(value) for name, value in state.items() if isinstance(value, np.ndarray)}
        self.__dict__.update(state | arrays)

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return [(name, value) for name, value in values if isinstance(value, torch.Tensor)]


def write_packed(
    stream: PieceStream, config: BatchConfig, examples: kernels.Examples, domain: int = kernels.TRAINING
) -> PackedBatch:
    """One micro-batch of these examples, which must fit."""
    packs = config.packs_per_micro_batch
    sizes = packs * config.encoder_tokens, packs * config.decoder_tokens, packs * config.examples_per_pack
    inputs, targets, cu_inputs, cu_targets = stream.write(examples, domain, sizes)
    sides, tokens = ((inputs, cu_inputs), (targets, cu_targets)), int(examples.length.sum())
    return PackedBatch.of(*sides, stream.max_lengths, examples.denoiser, examples.piece, tokens)
