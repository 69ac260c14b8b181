"""Batches of packed documents, and the configuration that fixes their shapes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from fat5.data.examples import kernels
from fat5.data.examples.order import PieceStream
from fat5.data.examples.packing import BUDGET_MULTIPLE, Budget
from fat5.errors import ConfigurationError, check_whole

EXAMPLE_TOKENS = 16  # encoder tokens of a pack per example it may hold


@dataclass(frozen=True)
class BatchConfig:
    """The shapes of training.

    Attributes:
        max_tokens: raw tokens of one example; longer documents are cut into consecutive pieces.
        encoder_tokens: encoder tokens of a pack, a multiple of 128.
        decoder_tokens: decoder tokens of a pack, a multiple of 128; `fat5 audit` suggests it.
        packs_per_step: packs of one optimizer step, in all processes and micro-batches.
        packs_per_micro_batch: packs of one forward pass of a process.
        window: waiting examples that the packing chooses from.
        max_examples: most examples of a pack; null for encoder_tokens / 16.
    """

    max_tokens: int = 1024
    encoder_tokens: int = 16384
    decoder_tokens: int = 8192
    packs_per_step: int = 8
    packs_per_micro_batch: int = 1
    window: int = 1024
    max_examples: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "max_examples" or value is not None:
                check_whole(value, f"data.{item.name}")
        for name in ("encoder_tokens", "decoder_tokens"):
            value = getattr(self, name)
            if value % BUDGET_MULTIPLE:
                nearest = -(-value // BUDGET_MULTIPLE) * BUDGET_MULTIPLE
                raise ConfigurationError(
                    f"must be a multiple of {BUDGET_MULTIPLE}, not {value}", where=f"data.{name}", hint=f"Try {nearest}"
                )
        if self.packs_per_step % self.packs_per_micro_batch:
            raise ConfigurationError(
                f"{self.packs_per_step} is not a multiple of packs_per_micro_batch ({self.packs_per_micro_batch})",
                where="data.packs_per_step",
            )

    @property
    def examples_per_pack(self) -> int:
        """Most examples of a pack."""
        return self.max_examples if self.max_examples is not None else max(8, self.encoder_tokens // EXAMPLE_TOKENS)

    def budget(self) -> Budget:
        """The limits of the packing."""
        return Budget(self.encoder_tokens, self.decoder_tokens, self.examples_per_pack, self.window)

    def check_longest(self, encoder: int, decoder: int) -> None:
        """Raises ConfigurationError if the longest example does not fit into a pack."""
        sides = (("encoder", encoder, self.encoder_tokens), ("decoder", decoder, self.decoder_tokens))
        for side, longest, room in sides:
            if longest > room:
                enough = -(-longest // BUDGET_MULTIPLE) * BUDGET_MULTIPLE
                raise ConfigurationError(
                    f"{room:,} is smaller than one example: a piece of max_tokens {self.max_tokens:,} can have "
                    f"{longest:,} {side} tokens",
                    where=f"data.{side}_tokens",
                    hint=f"Raise {side}_tokens to at least {enough}, or lower max_tokens",
                )


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

    @property
    def encoder_fill(self) -> float:
        """Share of the encoder budget in use."""
        return int(self.cu_seqlens[-1]) / self.input_ids.numel()

    @property
    def decoder_fill(self) -> float:
        """Share of the decoder budget in use."""
        return int(self.decoder_cu_seqlens[-1]) / self.labels.numel()

    @property
    def num_items(self) -> int:
        """Target tokens, by which a loss summed over the batch is divided."""
        return int(self.decoder_cu_seqlens[-1])

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


class BatchWriter:
    """Turns resolved examples into PackedBatch objects of one shape."""

    def __init__(self, stream: PieceStream, config: BatchConfig) -> None:
        """
        Raises:
            ConfigurationError: a budget smaller than one example.
        """
        self.stream = stream
        self.max_seqlen, self.decoder_max_seqlen = stream.mixture.max_lengths(
            config.max_tokens, len(stream.info.sentinel_ids)
        )
        config.check_longest(self.max_seqlen, self.decoder_max_seqlen)
        packs = config.packs_per_micro_batch
        self.encoder_tokens, self.decoder_tokens = packs * config.encoder_tokens, packs * config.decoder_tokens
        self.max_examples = packs * config.examples_per_pack

    def write(self, examples: kernels.Examples, domain: int = kernels.TRAINING) -> PackedBatch:
        """One batch of these examples, which must fit."""
        count = examples.piece.size
        inputs, targets, cu_inputs, cu_targets = self.stream.write(
            examples, domain, (self.encoder_tokens, self.decoder_tokens, self.max_examples)
        )
        denoiser, piece = np.full(self.max_examples, -1, np.int8), np.full(self.max_examples, -1, np.int64)
        denoiser[:count], piece[:count] = examples.denoiser, examples.piece
        return PackedBatch(
            torch.from_numpy(inputs),
            torch.from_numpy(cu_inputs),
            self.max_seqlen,
            torch.from_numpy(targets),
            torch.from_numpy(cu_targets),
            self.decoder_max_seqlen,
            torch.from_numpy(denoiser),
            torch.from_numpy(piece),
            count,
            int(examples.length.sum()),
        )
