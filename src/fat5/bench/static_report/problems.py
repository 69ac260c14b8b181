"""Calls that between them use every shipped kernel, and the launches that each of them records."""

from typing import NamedTuple

import torch
from torch import Tensor

from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.triton import backend as triton_attention
from fat5.ops.attention.triton.configuration import overridden
from fat5.ops.triton import adamw_scale as triton_adamw_scale
from fat5.ops.triton import cross_entropy as triton_cross_entropy
from fat5.ops.triton import few_rows as triton_few_rows
from fat5.ops.triton import geglu as triton_geglu
from fat5.ops.triton import rms_norm as triton_rms_norm
from fat5.ops.triton import rotary as triton_rotary
from fat5.ops.triton.launch import Launch, Recorded, recording


class Problem(NamedTuple):
    """The compile-time side of an attention call; its sizes are small and its strides those of real use."""

    width: int
    """Head dimension."""
    dtype: torch.dtype
    bias: str
    """relative, dense or none."""
    causal: bool = False
    packed: bool = True
    key_mask: bool = False
    dropout_p: float = 0.0

    def label(self) -> str:
        words = [self.bias, "causal" if self.causal else "", "packed" if self.packed else "padded"]
        words += ["key-mask" if self.key_mask else "", "dropout" if self.dropout_p else ""]
        return " ".join(word for word in words if word)


class FusedProblem(NamedTuple):
    """The compile-time side of a forward and backward of one of the operations around attention."""

    operation: str
    """One of FUSED."""
    width: int
    """d_model, d_ff, head dimension, vocabulary, or elements of a weight."""
    dtype: torch.dtype

    def label(self) -> str:
        return self.operation


# R of T5's bidirectional buckets with max_distance 128 (docs/attention.md).
REACH = 91
ROWS = 32


def launches(problem: Problem | FusedProblem, **launch: Launch) -> list[Recorded]:
    """The kernels of one forward and backward, recorded over small CPU tensors; `launch` overrides attention's
    table."""
    with recording() as recorded, overridden(**launch):
        if isinstance(problem, FusedProblem):
            FUSED[problem.operation](problem.width, problem.dtype)
        else:
            _attend(problem)
    return recorded


def _attend(problem: Problem) -> None:
    heads, length = 16, 256
    shape = (2 * length, heads, problem.width) if problem.packed else (2, length, heads, problem.width)
    q, k, v = (torch.zeros(shape, dtype=problem.dtype).requires_grad_() for _ in range(3))
    if not problem.packed:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    starts = torch.tensor([0, length, 2 * length], dtype=torch.int32) if problem.packed else None
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        vector=torch.zeros(heads, 2 * REACH + 1) if problem.bias == "relative" else None,
        dense=torch.zeros(1, heads, length, length, dtype=problem.dtype) if problem.bias == "dense" else None,
        key_padding_mask=torch.ones(2, length, dtype=torch.bool) if problem.key_mask else None,
        seed=torch.zeros(1, dtype=torch.int64) if problem.dropout_p else None,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        causal=problem.causal,
        scale=1.0,
        dropout_p=problem.dropout_p,
    )
    plan = triton_attention.plan(call)
    out, lse = triton_attention.forward(call, plan)
    triton_attention.backward(call, plan, torch.zeros_like(out), out, lse, problem.bias != "none")


def _rms_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = _zeros((ROWS, width), (width,), dtype=dtype)
    _, inverse = triton_rms_norm.rms_norm_forward(x, weight, 1e-6)
    triton_rms_norm.rms_norm_backward(x, x, weight, inverse)


def _geglu(width: int, dtype: torch.dtype) -> None:
    gate, up = _zeros((ROWS, width), (ROWS, width), dtype=dtype)
    triton_geglu.geglu_forward(gate, up)
    triton_geglu.geglu_backward(gate, gate, up)


def _geglu_joined(width: int, dtype: torch.dtype) -> None:
    joined, grad = _zeros((ROWS, 2 * width), (ROWS, width), dtype=dtype)
    triton_geglu.geglu_joined_forward(joined)
    triton_geglu.geglu_joined_backward(grad, joined)


def _rotary(width: int, dtype: torch.dtype) -> None:
    (x,), (angles,) = _zeros((ROWS, 8, width), dtype=dtype), _zeros((ROWS, width // 2))
    triton_rotary.rotary_forward(x, angles, angles, False)


def _cross_entropy(width: int, dtype: torch.dtype) -> None:
    (logits,), (loss,) = _zeros((ROWS, width), dtype=dtype), _zeros((ROWS,))
    labels = torch.zeros(ROWS, dtype=torch.int64)
    # With and without gradient, and with every option.
    triton_cross_entropy.cross_entropy_(logits, labels, loss, None, 1e-4, 0.0, -100, True)
    triton_cross_entropy.cross_entropy_(logits, labels, loss, loss.clone(), 1e-4, 0.1, -100, True)
    triton_cross_entropy.cross_entropy_(logits, labels, loss, None, 1e-4, 0.0, -100, False)


def _adamw_scale(width: int, dtype: torch.dtype) -> None:
    weights, grads = (_zeros((width,), (width,), dtype=dtype) for _ in range(2))
    first, second = (_zeros((width,), (width,)) for _ in range(2))
    lost = [torch.zeros_like(weight) for weight in weights] if dtype != torch.float32 else []
    (skip,), steps = _zeros(()), _zeros((), ())
    triton_adamw_scale.adamw_scale_(weights, grads, first, second, lost, steps, skip, 1e-3, 0.9, 0.999, 1e-6, 0.1, 1e-3)


def _decoding(width: int, dtype: torch.dtype) -> None:
    """A step of 8 rows, and of 64 in beams, with heads of 64."""
    heads, capacity, memory = width // 64, 128, 256
    for rows, beams in ((8, 1), (64, 4)):
        items, wide, many = rows // beams, 4 * width, triton_few_rows.MANY
        x, norm, joined, gate, up, outer, head = _zeros(
            (rows, width), (width,), (3 * width, width), (wide, width), (wide, width), (width, wide), (many, width),
            dtype=dtype,
        )  # fmt: skip
        keys, values = _zeros(*[(items, heads, capacity, beams, 64)] * 2, dtype=dtype)
        bias, memory_keys = _zeros((heads, 2 * capacity - 1), (items, heads, memory, 64), dtype=dtype)
        (hidden,) = _zeros((items, memory))
        position, ends, ancestors, tokens, written = (
            torch.zeros(shape, dtype=torch.int64)
            for shape in ((1,), (items,), (items, beams, capacity), (rows,), (rows, 1 + capacity))
        )
        own = triton_few_rows.project(x, joined, norm=norm, eps=1e-6)
        mixed = triton_few_rows.attend_own(own, keys, values, bias, position, ancestors)
        triton_few_rows.attend_memory(mixed, memory_keys, memory_keys, hidden, ends)
        inner = triton_few_rows.project(x, gate, norm=norm, eps=1e-6, activation="gelu", second=up)
        triton_few_rows.project(x, gate, norm=norm, eps=1e-6, activation="relu")
        triton_few_rows.project(inner, outer, residual=x)
        best, index = triton_few_rows.largest_outputs(x, head, norm=norm, eps=1e-6)
        ended = torch.zeros(rows, dtype=torch.int32)
        triton_few_rows.choose(best, index, tokens, written, ended, tokens.clone(), tokens[:1], position, 0)


def _zeros(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


FUSED = {
    "rms_norm": _rms_norm,
    "geglu": _geglu,
    "geglu_joined": _geglu_joined,
    "rotary": _rotary,
    "linear_cross_entropy": _cross_entropy,
    "adamw_scale": _adamw_scale,
    "decoding": _decoding,
}
