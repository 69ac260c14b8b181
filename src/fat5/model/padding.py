"""Padded rows and packed segments: how tokens lie in memory, and the way from one to the other.

    packed    (T, d), the segments (documents) end to end, with cu_seqlens
    padded    (B, L, d), a row a text, with a mask

Padded inputs are packed on entry and padded again on exit; decoding with a cache runs on rows.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Segments:
    """Where the segments of a tensor of tokens begin and end.

    Args:
        cu_seqlens: int32 (N+1,) for packed tokens (T, ...); None for rows (B, L, ...).
        max_seqlen: upper bound of the segments' lengths; for rows, their length.
        mask: (B, L) bool, True = a key to attend to; None when all are. Packed tokens with a mask are whole rows.
            With a cache also (B, 1, Lq, Lk), bool or to be added to the scores.
        formed: attention to these tokens forms its weights, as the plain formula does: because they are asked for, a
            graph is recorded, or the mask leaves a query without a key.
    """

    cu_seqlens: Tensor | None
    max_seqlen: int
    mask: Tensor | None = None
    formed: bool = False
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What the attention of a stack's blocks shares (`fat5.ops.attention`)."""

    @property
    def masks_scores(self) -> bool:
        """Whether the mask has an entry for each query and key."""
        return self.mask is not None and self.mask.dim() == 4

    def to(self, device: torch.device | str, **how: Any) -> "Segments":
        """The same on another device, which the accelerate library calls for a model spread over several."""
        starts, mask = (None if x is None else x.to(device, **how) for x in (self.cu_seqlens, self.mask))
        return replace(self, cu_seqlens=starts, mask=mask)

    def positions(self, tokens: Tensor) -> Tensor:
        """The position of each token in its segment: (T,) packed, (1, L) for rows. Those behind the last segment count
        from its end.
        """
        if self.cu_seqlens is None:
            return torch.arange(tokens.shape[1], device=tokens.device)[None]
        total, starts = len(tokens), self.cu_seqlens
        row = torch.arange(total, device=starts.device, dtype=starts.dtype)
        return (row - starts[segment_numbers(starts, total)]).long()


def segment_numbers(cu_seqlens: Tensor, total: int) -> Tensor:
    """(T,) int64: the segment of each packed token; N for those behind the last."""
    row = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # Not of `cu_seqlens[1:]`: torch.compile searches from the first entry of what was sliced (pytorch issue 182343).
    return torch.searchsorted(cu_seqlens, row, right=True) - 1


def shift_right(labels: Tensor, positions: Tensor, start_id: int, pad_id: int) -> Tensor:
    """Decoder inputs: the labels of each segment moved one to the right behind `start_id`; -100 becomes `pad_id`."""
    shifted = torch.where(positions == 0, start_id, labels.roll(1, dims=-1))
    return torch.where(shifted == -100, pad_id, shifted)


@dataclass
class Padding:
    """Packs padded rows (B, L) into the tokens that a stack computes, and pads its output again.

    Args:
        segments: of those tokens. With a mask they are whole rows, some of whose keys are hidden.
        index: (T,) int64, where each token stands in the flattened rows; None for whole rows.
        kept: (B, L) bool, the positions whose states come back; the others come back as zeros. None = all.
    """

    segments: Segments
    shape: tuple[int, int]
    index: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def of(
        cls, mask: Tensor | None, shape: tuple[int, int], device: torch.device, *, whole: bool, causal: bool = False
    ) -> "Padding":
        """From a (B, L) mask, non-zero = a token.

        Args:
            whole: compute every position; the mask only hides keys, as in stock T5. Otherwise masked positions are left
                out and come back as zeros. They are still computed where the mask has holes, since packing would move
                tokens, and in a row without a token, since a decoder reads all of that row.
            causal: query i attends to keys 0..i.

        The host waits for the device to read a mask: once for encoder and decoder if both get one tensor. In
        torch.compile nothing is read, and every position is computed.
        """
        global _latest
        batch, length = shape
        if mask is None or batch * length == 0:
            return cls(_whole_rows(shape, device), shape)
        mask = mask.to(device)
        if torch.compiler.is_compiling():
            # A graph for every mask: whole rows. A row without a token attends to all of its keys.
            mask = mask.bool()
            seen = mask if causal else mask | ~mask.any(dim=1, keepdim=True)
            segments = replace(_whole_rows(shape, device), mask=seen, formed=causal)
            return cls(segments, shape, kept=None if whole else kept_positions(mask))
        # What a generation in inference mode has read, a training step must not save for its backward pass.
        mode = torch.is_inference_mode_enabled()
        asked = (mask._version, shape, whole, mode) if _is_rememberable(mask) and not causal else None
        if asked is not None and _latest is not None and _latest[0]() is mask and _latest[1] == asked:
            padding = _latest[2]
            return replace(padding, segments=replace(padding.segments, shared={}))
        padding = cls._read(mask.bool(), shape, whole, causal)
        if asked is not None:
            _latest = weakref.ref(mask), asked, padding
        return padding

    @classmethod
    def _read(cls, mask: Tensor, shape: tuple[int, int], whole: bool, causal: bool) -> "Padding":
        """The host waits for the device once."""
        length = shape[1]
        lengths, runs = mask.sum(dim=1), (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1) + mask[:, 0]
        asked = torch.stack([runs.max(), lengths.min(), mask[:, 0].min(), lengths.max(), lengths.sum()])
        most_runs, shortest, first, longest, total = asked.tolist()
        if shortest == length:
            return cls(_whole_rows(shape, mask.device), shape)
        if not whole and most_runs <= 1 and shortest > 0:
            return cls._of_tokens(mask, lengths, longest, total)
        segments = _whole_rows(shape, mask.device)
        segments = replace(segments, mask=mask, formed=not (first if causal else shortest))
        return cls(segments, shape, kept=None if whole else kept_positions(mask))

    @classmethod
    def leaving_out(cls, mask: Tensor) -> "Padding":
        """Packs exactly the tokens of a (B, L) bool mask, holes or not."""
        lengths = mask.sum(dim=1)
        longest, total = torch.stack([lengths.max(), lengths.sum()]).tolist() if len(mask) else (0, 0)
        return cls._of_tokens(mask, lengths, longest, total)

    @classmethod
    def _of_tokens(cls, mask: Tensor, lengths: Tensor, longest: int, total: int) -> "Padding":
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        index = torch.nonzero_static(mask.flatten(), size=total)[:, 0]
        return cls(Segments(starts, longest), (mask.shape[0], mask.shape[1]), index=index)

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
        """(T, d) to (B, L, d), zeros at positions that are not kept."""
        return keep(self.pad(packed), self.kept)


_latest: tuple[Any, tuple[Any, ...], Padding] | None = None
"""The mask that was read last (a weak reference), what was asked of it, and the answer."""


def _is_rememberable(mask: Tensor) -> bool:
    """Whether a change of the mask would show, and nothing that a recorded CUDA graph reads would be forgotten."""
    return not (mask.is_inference() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()))


def _whole_rows(shape: tuple[int, int], device: torch.device) -> Segments:
    batch, length = shape
    return Segments(torch.arange(batch + 1, device=device, dtype=torch.int32) * length, length)


def keep(rows: Tensor, kept: Tensor | None) -> Tensor:
    return rows if kept is None else rows * kept[..., None].to(rows)


def kept_positions(mask: Tensor) -> Tensor:
    """(B, L) bool: the tokens of a mask, and every position of a row without a token, which a decoder reads."""
    return mask | ~mask.any(dim=1, keepdim=True)


@dataclass
class Trace:
    """Hidden states and attention weights that a stack records; None for those not asked for.

    Args:
        hidden: the hidden states before each block and after the last, as rows.
        attentions, cross_attentions: the weights, (B, H, L, L) and (B, H, L, S) a block.
        chosen: the places in `hidden` that are asked for, negative ones from the end; None = all.
        to_rows, from_rows: convert the stack's tokens to rows, and back.
    """

    hidden: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    cross_attentions: list[Tensor] | None = None
    chosen: list[int] | None = None
    to_rows: Callable[[Tensor], Tensor] | None = None
    from_rows: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, config: Any, hidden_states: bool | int | list[int] | None, attentions: bool | None) -> "Trace":
        """Lists for what is asked for, by default in the configuration; `hidden_states` may name places, as in
        transformers.
        """
        hidden_states = config.output_hidden_states if hidden_states is None else hidden_states
        attentions = config.output_attentions if attentions is None else attentions
        chosen = None
        if hidden_states is not None and not isinstance(hidden_states, bool):
            chosen = [hidden_states] if isinstance(hidden_states, int) else list(hidden_states)
        return cls([] if hidden_states else None, [] if attentions else None, [] if attentions else None, chosen)

    def passed(self, hidden: Tensor) -> Tensor:
        """Records the hidden states if asked to, and returns those to go on with: computed from the recorded ones, so
        that their gradient can be read.
        """
        if self.hidden is None:
            return hidden
        self.hidden.append(hidden if self.to_rows is None else self.to_rows(hidden))
        return self.hidden[-1] if self.from_rows is None else self.from_rows(self.hidden[-1])

    def kept(self) -> tuple[tuple[Tensor | None, ...] | None, ...]:
        """hidden, attentions, cross_attentions, as tuples; hidden states that were not chosen are None."""
        hidden: tuple[Tensor | None, ...] | None = None if self.hidden is None else tuple(self.hidden)
        if hidden is not None and self.chosen is not None:
            count = len(hidden)
            places = {place % count for place in self.chosen if -count <= place < count}
            hidden = tuple(state if place in places else None for place, state in enumerate(hidden))
        weights = (None if kept is None else tuple(kept) for kept in (self.attentions, self.cross_attentions))
        return (hidden, *weights)


def run_packed(
    stack: Any,
    rows: Tensor,
    mask: Tensor | None,
    *,
    whole: bool,
    causal: bool,
    trace: Trace,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
) -> Tensor:
    """Runs a stack over padded rows (B, L[, d]), packed inside; returns its hidden states (B, L, d).

    `whole`: every position is computed, and the mask only hides keys; otherwise masked positions are left out and come
    back as zeros.
    """
    padding = Padding.of(mask, (rows.shape[0], rows.shape[1]), rows.device, whole=whole, causal=causal)
    trace.to_rows, trace.from_rows = padding.restore, padding.pack
    how: dict[str, Any] = {"trace": trace}
    if memory is not None:
        across = Padding.of(memory_mask, (memory.shape[0], memory.shape[1]), rows.device, whole=False)
        how |= {"memory": across.pack(memory), "memory_segments": across.segments}
    return padding.restore(stack(padding.pack(rows), padding.segments, **how))


def check_mask(name: str, mask: Tensor | None, tokens: Tensor) -> None:
    """Raises ValueError for a mask that is not one of tokens (B, L): of another length it would hide other tokens."""
    shape = tuple(tokens.shape[:2])
    if mask is not None and tuple(mask.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, a number for each token, got {tuple(mask.shape)}")
