"""Padded rows (B, L) through a stack, packed inside."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fat5.model.layout import Layout, Padding, keep, kept_positions
from fat5.ops import is_recorded


@dataclass
class Trace:
    """What a stack keeps of its way; None where it is not asked for.

    Args:
        hidden: the hidden states before each block and after the last, as rows.
        attentions: the weights of self-attention, (B, H, L, L) a block.
        cross_attentions: those of cross-attention, (B, H, L, S) a block.
        chosen: the places in `hidden` that are asked for, negative ones from the end; None = all.
        to_rows, from_rows: the way from the stack's tokens to rows, and back.
    """

    hidden: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    cross_attentions: list[Tensor] | None = None
    chosen: list[int] | None = None
    to_rows: Callable[[Tensor], Tensor] | None = None
    from_rows: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, hidden_states: bool | int | list[int] | None, attentions: bool | None) -> "Trace":
        """Lists for what is asked for; `hidden_states` may name places, as in transformers."""
        chosen = None
        if hidden_states is not None and not isinstance(hidden_states, bool):
            chosen = [hidden_states] if isinstance(hidden_states, int) else list(hidden_states)
        return cls([] if hidden_states else None, [] if attentions else None, [] if attentions else None, chosen)

    def passed(self, hidden: Tensor) -> Tensor:
        """Keeps the hidden states, where asked, and gives those to go on with: made of what was kept, so that its
        gradient can be read.
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


def run_rows(
    stack: Any,
    rows: Tensor,
    mask: Tensor | None,
    *,
    whole: bool,
    causal: bool,
    trace: Trace,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Runs a stack over padded rows (B, L[, d]), packed inside; returns its output and the way back to rows.

    `whole`: every position is computed, and the mask hides keys alone; otherwise hidden positions are left out, and
    come back as zeros. Rows stay rows where attention weights are asked for, or a graph is recorded (torch.export,
    torch.jit.trace).
    """
    shape = (rows.shape[0], rows.shape[1])
    check_mask("attention_mask", mask, shape)
    memory_shape = (0, 0) if memory is None else (memory.shape[0], memory.shape[1])
    if memory is not None:
        check_mask("attention_mask of the encoder's tokens", memory_mask, memory_shape)
    if is_recorded() or trace.attentions is not None:
        tokens, memory_tokens = (None if x is None else x.bool() for x in (mask, memory_mask))
        how: dict[str, Any] = {"trace": trace}
        if memory is not None:
            how |= {"memory": memory, "memory_layout": Layout(None, memory_shape[1], memory_tokens, formed=True)}
        kept = None if whole or tokens is None else kept_positions(tokens)
        if kept is not None:
            trace.to_rows = partial(keep, kept=kept)
        return stack(rows, Layout(None, shape[1], tokens, formed=True), **how), lambda x: keep(x, kept)
    padding = Padding.of(mask, shape, rows.device, whole=whole, causal=causal)
    trace.to_rows, trace.from_rows = padding.restore, padding.pack
    how = {"trace": trace}
    if memory is not None:
        across = Padding.of(memory_mask, memory_shape, rows.device, whole=False)
        how |= {"memory": across.pack(memory), "memory_layout": across.layout}
    return stack(padding.pack(rows), padding.layout, **how), padding.restore


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Raises ValueError for a mask that is not one of tokens (B, L): of another length it would hide other tokens."""
    if mask is not None and tuple(mask.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, a number for each token, got {tuple(mask.shape)}")
