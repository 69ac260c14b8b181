"""How tokens lie in memory: packed documents (T, d) with their boundaries, or padded rows (B, L, d) with a mask.

Training and encoding run packed, so that padding costs nothing where nobody reads it; padded inputs are packed on entry
and padded again on exit. Decoding with a cache runs on rows.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Layout:
    """The documents of a tensor of tokens.

    Args:
        cu_seqlens: int32 (N+1,) for packed tokens (T, ...); None for rows (B, L, ...).
        max_seqlen: upper bound of the documents' lengths; for rows, their length.
        mask: (B, L) bool, True = a key to attend to; None when all are. Packed tokens that have one are whole rows.
            Behind a cache also (B, 1, Lq, Lk), bool or to be added to the scores.
        formed: attention to these tokens forms its weights, as the plain formula does: they are asked for, a graph is
            recorded, or the mask leaves a query without a key.
    """

    cu_seqlens: Tensor | None
    max_seqlen: int
    mask: Tensor | None = None
    formed: bool = False

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def masks_scores(self) -> bool:
        """Whether the mask has an entry for each query and key."""
        return self.mask is not None and self.mask.dim() == 4

    def to(self, device: torch.device | str, **how: Any) -> "Layout":
        """The same layout on another device, as accelerate asks for where a model is spread over several."""
        starts, mask = (None if x is None else x.to(device, **how) for x in (self.cu_seqlens, self.mask))
        return replace(self, cu_seqlens=starts, mask=mask)

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
    """The way from padded rows to the tokens that a stack computes, and back.

    Args:
        layout: of those tokens. With a mask they are whole rows, some of whose keys are hidden.
        shape: (B, L) of the rows.
        index: (T,) int64, where each token stands in the flattened rows; None where the rows are whole.
        kept: (B, L) bool, the positions whose states come back; the others come back as zeros. None = all.
    """

    layout: Layout
    shape: tuple[int, int]
    index: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def of(
        cls, mask: Tensor | None, shape: tuple[int, int], device: torch.device, *, whole: bool, causal: bool = False
    ) -> "Padding":
        """From a (B, L) mask, non-zero = a token.

        Args:
            whole: every position is computed, and the mask hides keys alone, as in stock T5. Otherwise positions that
                the mask hides are left out, and come back as zeros. Where the mask has holes they are computed all the
                same: packing would move tokens. So is a row without a token: a decoder reads all of it.
            causal: query i attends to keys 0..i.
        """
        batch, length = shape
        starts = torch.arange(batch + 1, device=device, dtype=torch.int32) * length
        if mask is None or batch * length == 0:
            return cls(Layout(starts, length), shape)
        mask = mask.to(device).bool()
        lengths, runs = mask.sum(dim=1), (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1) + mask[:, 0]
        most_runs, shortest, first = torch.stack([runs.max(), lengths.min(), mask[:, 0].min()]).tolist()
        if shortest == length:
            return cls(Layout(starts, length), shape)
        if not whole and most_runs <= 1 and shortest > 0:
            return cls.leaving_out(mask)
        layout = Layout(starts, length, mask, formed=not (first if causal else shortest))
        return cls(layout, shape, kept=None if whole else kept_positions(mask))

    @classmethod
    def leaving_out(cls, mask: Tensor) -> "Padding":
        """The tokens of a (B, L) bool mask, packed, whatever lies between them."""
        lengths = mask.sum(dim=1)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max()) if len(mask) else 0
        return cls(Layout(starts, longest), (mask.shape[0], mask.shape[1]), index=mask.flatten().nonzero()[:, 0])

    def pack(self, rows: Tensor) -> Tensor:
        """(B, L, ...) to (T, ...)."""
        rows = rows.flatten(0, 1)
        return rows if self.index is None else rows.index_select(0, self.index)

    def pad(self, packed: Tensor) -> Tensor:
        """(T, ...) to (B, L, ...), zeros where there is no token."""
        if self.index is not None:
            rows = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
            packed = rows.index_copy(0, self.index.to(packed.device), packed)
        return packed.unflatten(0, self.shape)

    def restore(self, packed: Tensor) -> Tensor:
        """(T, d) to (B, L, d): what a stack gives back, zeros at positions that are not kept."""
        return keep(self.pad(packed), self.kept)


def keep(rows: Tensor, kept: Tensor | None) -> Tensor:
    """(B, L, d) with zeros at positions that are not kept."""
    return rows if kept is None else rows * kept[..., None].to(rows)


def kept_positions(mask: Tensor) -> Tensor:
    """(B, L) bool: the tokens of a mask, and every position of a row without a token, which a decoder reads."""
    return mask | ~mask.any(dim=1, keepdim=True)
