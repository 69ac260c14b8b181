"""How tokens lie in memory: packed documents (T, d) with their boundaries, or padded rows (B, L, d) with a mask.

Training and encoding run packed, so that padding costs nothing; padded inputs are packed on entry and padded again on
exit. Decoding with a cache runs on rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def is_recorded() -> bool:
    """Whether a graph is being recorded that is to hold for other batches: nothing may hang on what a mask holds, and
    only plain operations can be said in it.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


@dataclass
class Layout:
    """The documents of a tensor of tokens.

    Args:
        cu_seqlens: int32 (N+1,) for packed tokens (T, ...); None for rows (B, L, ...).
        max_seqlen: upper bound of the documents' lengths; for rows, their length.
        mask: (B, L) bool for rows, True = a token; None when all are. Behind a cache also (B, 1, Lq, Lk), bool or to be
            added to the scores.
    """

    cu_seqlens: Tensor | None
    max_seqlen: int
    mask: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def to(self, device: torch.device | str, **how: Any) -> "Layout":
        """The same layout on another device, as accelerate asks for where a model is spread over several."""
        starts, mask = (None if x is None else x.to(device, **how) for x in (self.cu_seqlens, self.mask))
        return Layout(starts, self.max_seqlen, mask)

    def positions(self, tokens: Tensor) -> Tensor:
        """The position of each token in its document, shaped like `tokens`' leading dimensions: (T,) or (1, L)."""
        if self.cu_seqlens is None:
            return torch.arange(tokens.shape[1], device=tokens.device)[None]
        return document_positions(self.cu_seqlens, tokens.shape[0])


def document_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """(T,) int64: positions inside each packed document; rows beyond the last document count from its end."""
    row = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    return (row - cu_seqlens[document]).long()


def shift_right(labels: Tensor, positions: Tensor, start_id: int, pad_id: int) -> Tensor:
    """Decoder inputs: each document's labels moved one to the right, its first input being `start_id`; -100 becomes
    `pad_id`.
    """
    shifted = torch.where(positions == 0, start_id, labels.roll(1, dims=-1))
    return torch.where(shifted == -100, pad_id, shifted)


@dataclass
class Padding:
    """The way from padded rows to packed tokens and back.

    Args:
        index: (T,) int64, where each packed token stands in the flattened rows.
        layout: of the packed tokens.
        shape: (B, L) of the rows.
    """

    index: Tensor
    layout: Layout
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> "Padding | None":
        """From a (B, L) mask, non-zero = a token. None when some row has holes: packing would move its tokens."""
        batch, length = shape
        if mask is None:
            starts = torch.arange(0, (batch + 1) * length, max(length, 1), device=device, dtype=torch.int32)[
                : batch + 1
            ]
            if length == 0:
                starts = torch.zeros(batch + 1, device=device, dtype=torch.int32)
            return cls(torch.arange(batch * length, device=device), Layout(starts, length), shape)
        mask = mask.bool()
        edges = (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1) + mask[:, 0]
        if bool((edges > 1).any()):
            return None
        lengths = mask.sum(dim=1)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(mask.flatten().nonzero()[:, 0], Layout(starts, int(lengths.max()) if batch else 0), shape)

    def pack(self, rows: Tensor) -> Tensor:
        """(B, L, ...) to (T, ...)."""
        return rows.flatten(0, 1).index_select(0, self.index)

    def pad(self, packed: Tensor) -> Tensor:
        """(T, ...) to (B, L, ...), zeros where there is no token."""
        batch, length = self.shape
        rows = packed.new_zeros(batch * length, *packed.shape[1:])
        return rows.index_copy(0, self.index.to(packed.device), packed).view(batch, length, *packed.shape[1:])
