"""Padded rows (B, L) through a stack: packed inside where that moves no token, as they are otherwise."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fat5.model.layout import Layout, Padding, is_recorded


@dataclass
class Trace:
    """What a stack is asked to keep on its way; None is kept nothing of.

    Args:
        hidden: the hidden states before each block and after the last.
        attentions: the weights of self-attention, (B, H, L, L) a block.
        cross_attentions: those of cross-attention, (B, H, L, S) a block.
    """

    hidden: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    cross_attentions: list[Tensor] | None = None

    @classmethod
    def of(cls, hidden_states: bool | None, attentions: bool | None) -> "Trace":
        """Lists for what is asked for."""
        return cls([] if hidden_states else None, [] if attentions else None, [] if attentions else None)

    def padded(self, back: Any) -> tuple[tuple[Tensor, ...] | None, ...]:
        """hidden (each through `back`), attentions, cross_attentions, as tuples."""
        hidden = None if self.hidden is None else tuple(back(x) for x in self.hidden)
        weights = (None if kept is None else tuple(kept) for kept in (self.attentions, self.cross_attentions))
        return (hidden, *weights)


def run_rows(
    stack: Any,
    rows: Tensor,
    mask: Tensor | None,
    *,
    trace: Trace | None = None,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Runs a stack over padded rows (B, L[, d]), packed inside; returns its output and the way back to rows.

    A mask with holes in it cannot be packed without moving tokens, which relative positions would notice; such rows
    run as they are, and so does everything with a memory whose mask has holes, whose attention weights are asked for,
    or whose graph is recorded (torch.export, torch.jit.trace).
    """
    shape = (rows.shape[0], rows.shape[1])
    check_mask("attention_mask", mask, shape)
    if memory is not None:
        check_mask("attention_mask of the encoder's tokens", memory_mask, (memory.shape[0], memory.shape[1]))
    formed = is_recorded() or (trace is not None and trace.attentions is not None)
    padding = None if formed else Padding.of(mask, shape, rows.device)
    how: dict[str, Any] = {"trace": trace}
    if memory is not None:
        memory_padding = None if formed else Padding.of(memory_mask, (memory.shape[0], memory.shape[1]), rows.device)
        if memory_padding is None:
            padding = None
        elif padding is not None:
            how |= {"memory": memory_padding.pack(memory), "memory_layout": memory_padding.layout}
        if padding is None:
            kept = None if memory_mask is None else memory_mask.bool()
            how |= {"memory": memory, "memory_layout": Layout(None, memory.shape[1], kept)}
    if padding is not None:
        return stack(padding.pack(rows), padding.layout, **how), padding.pad
    tokens = None if mask is None else mask.bool()
    keep = torch.ones(shape, dtype=torch.bool, device=rows.device) if tokens is None else tokens
    return stack(rows, Layout(None, shape[1], tokens), **how), lambda x: x * keep[..., None].to(x)


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Raises ValueError for a mask that is not one of tokens (B, L): of another length it would hide other tokens."""
    if mask is not None and tuple(mask.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, a number for each token, got {tuple(mask.shape)}")
