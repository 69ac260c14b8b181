"""The public attention function: it validates its arguments, chooses a backend, and hands over one `AttentionCall`."""

from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from fat5.ops.attention import op
from fat5.ops.attention.bias import RelativeBias
from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.crosscheck import attention_flex, attention_sdpa
from fat5.ops.attention.dropout import draw_seed
from fat5.ops.attention.reference import attention_reference

PLAIN = {"reference": attention_reference, "sdpa": attention_sdpa, "flex": attention_flex}
"""Backends in plain PyTorch, differentiated by autograd; the others are registered in op.py."""
BACKENDS = ("auto", *op.BACKENDS, *PLAIN)
PREFERRED = {"cpu": ("cpu",), "meta": ("cpu",), "cuda": ("hopper", "mixed", "triton")}
"""The backends that "auto" tries on a device, the best first; the reference serves what they cannot."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: RelativeBias | Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
    shared: dict[Any, Any] | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v, with documents kept apart; exact gradients for q, k, v and the bias.

    Args:
        q, k, v: batched, q (B, H, Lq, D) and k, v (B, H, Lk, D); or packed (when cu_seqlens are given), q (Tq, H, D)
            and k, v (Tk, H, D). Any strides, one floating-point dtype.
        bias: None, a `RelativeBias`, or a dense tensor: batched, broadcasting to (B, H, Lq, Lk); packed, of shape
            (1|N, 1|H, max_seqlen_q, max_seqlen_k), indexed by the positions inside each document.
        causal: query i sees keys 0..i of its document (top-left aligned).
        scale: multiplies q k^T; 1.0 is T5's.
        dropout_p: dropout of the attention weights, in [0, 1); the mask is counter-based (dropout.py).
        cu_seqlens_q, cu_seqlens_k: int32 (int64 is converted) (N+1,), non-decreasing, from 0: document n holds rows
            cu[n]..cu[n+1]. Rows at or after the last value belong to no document: zeros out, zero gradients.
        max_seqlen_q, max_seqlen_k: Python ints, upper bounds of the documents' lengths. Left out, they are read from
            cu_seqlens, which waits for the device and cannot be compiled; a training step should give them.
        key_padding_mask: (B, Lk) bool, batched only; True = attend.
        backend: one of `BACKENDS`. "auto" is Triton's kernels on CUDA where they serve (Hopper's where those are
            faster), the CPU path on the CPU, and the reference elsewhere; they agree up to rounding. Hopper's want
            finite numbers in the rows behind the last document.
        shared: one empty dict for the calls of a stack, which keeps what their kernels make of bias and boundaries;
            without it each call makes that anew (torch.compile makes it once in any case).

    Returns:
        Of q's shape and dtype. A query with no visible key gives zeros.

    Raises:
        TypeError, ValueError: naming the argument and what was expected. Values of cu_seqlens are checked only on the
            CPU, where looking at them costs no synchronisation.
        RuntimeError: the backend asked for is not available here.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_tensors(q, k, v, packed)
    for name, number in (("scale", scale), ("dropout_p", dropout_p)):
        if not isinstance(number, Real):
            raise TypeError(f"{name}: expected a number, got {number!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if packed:
        if key_padding_mask is not None:
            raise ValueError("key_padding_mask: packed inputs take none, documents have no padding")
        one = cu_seqlens_q is cu_seqlens_k
        cu_seqlens_q, max_seqlen_q = _check_cu_seqlens("q", cu_seqlens_q, max_seqlen_q, q)
        cu_seqlens_k, max_seqlen_k = _check_cu_seqlens("k", cu_seqlens_k, max_seqlen_k, k)
        # Kernels read the boundaries one after another. Given as one tensor they stay one.
        cu_seqlens_q = cu_seqlens_q.contiguous()
        cu_seqlens_k = cu_seqlens_q if one else cu_seqlens_k.contiguous()
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_k: expected as many documents as cu_seqlens_q, got {len(cu_seqlens_k) - 1} and "
                f"{len(cu_seqlens_q) - 1}"
            )
    else:
        max_seqlen_q, max_seqlen_k = q.shape[2], k.shape[2]
        _check_key_padding_mask(key_padding_mask, k)
    documents = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    bias = _check_bias(bias, q, packed, (documents, q.shape[1], max_seqlen_q, max_seqlen_k))
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        vector=bias.vector if isinstance(bias, RelativeBias) else None,
        dense=bias if isinstance(bias, Tensor) else None,
        key_padding_mask=key_padding_mask,
        seed=draw_seed(q.device) if dropout_p > 0.0 else None,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        causal=causal,
        scale=float(scale),
        dropout_p=float(dropout_p),
    )
    chosen = _choose(call, backend)
    if q.device.type == "meta" or not torch.is_autocast_enabled(q.device.type):
        return _serve(call, chosen, shared)
    # Autocast would round what a backend in plain PyTorch keeps in float32.
    with torch.autocast(q.device.type, enabled=False):
        return _serve(call, chosen, shared)


def _choose(call: AttentionCall, backend: str) -> str:
    """The name of the backend that serves the call."""
    if backend == "auto":
        for name in PREFERRED.get(call.q.device.type, ()):
            if op.SELECTIVE.get(name, _always)(call) and op.BACKENDS[name].unsupported(call) is None:
                return name
        return "reference"
    reason = op.BACKENDS[backend].unsupported(call) if backend in op.BACKENDS else None
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot serve this call: {reason}")
    return backend


def _always(_call: AttentionCall) -> bool:
    return True


def _serve(call: AttentionCall, backend: str, shared: dict[Any, Any] | None) -> Tensor:
    return op.attend(call, backend, shared) if backend in op.BACKENDS else PLAIN[backend](call)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    dimensions, layout = (3, "(tokens, heads, head_dim)") if packed else (4, "(batch, heads, length, head_dim)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor of shape {layout}")
        if x.dim() != dimensions:
            hint = "with cu_seqlens" if packed else "without cu_seqlens"
            raise ValueError(f"{name}: expected shape {layout} {hint}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if packed:
        if q.shape[1:] != k.shape[1:]:
            raise ValueError(f"k: expected {q.shape[1]} heads of {q.shape[2]}, as q has, got {tuple(k.shape[1:])}")
    elif q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: expected shape {(*q.shape[:2], 'Lk', q.shape[3])} to fit q, got {tuple(k.shape)}")


def _check_cu_seqlens(side: str, cu_seqlens: Tensor | None, max_seqlen: int | None, x: Tensor) -> tuple[Tensor, int]:
    name = f"cu_seqlens_{side}"
    if cu_seqlens is None:
        raise ValueError(f"{name}: packed attention needs cu_seqlens_q and cu_seqlens_k, this one is None")
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: expected an int32 tensor of shape (documents + 1,), got {type(cu_seqlens).__name__}")
    if max_seqlen is not None and not isinstance(max_seqlen, int):
        raise TypeError(f"max_seqlen_{side}: expected an int or None, got {max_seqlen!r}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise TypeError(
            f"{name}: expected an int32 tensor of shape (documents + 1,), got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"{name}: expected the device of q, {x.device}, got {cu_seqlens.device}")
    cu_seqlens = cu_seqlens.to(torch.int32)
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(cu_seqlens):
        starts = cu_seqlens.tolist()
        lengths = [after - before for before, after in pairwise(starts)]
        if starts[0] != 0 or any(length < 0 for length in lengths):
            raise ValueError(f"{name}: expected non-decreasing values from 0")
        if starts[-1] > x.shape[0]:
            raise ValueError(f"{name}: the last value {starts[-1]} is beyond the {x.shape[0]} rows of {side}")
        if lengths and max(lengths) > max_seqlen:
            raise ValueError(f"max_seqlen_{side}: {max_seqlen} is below the longest document, {max(lengths)}")
    return cu_seqlens, max_seqlen


def _check_key_padding_mask(mask: Tensor | None, k: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"key_padding_mask: expected a bool tensor, True = attend, got {got}")
    if mask.device != k.device:
        raise ValueError(f"key_padding_mask: expected the device of q, {k.device}, got {mask.device}")
    if mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_padding_mask: expected shape {(k.shape[0], k.shape[2])}, got {tuple(mask.shape)}")


def _check_bias(
    bias: RelativeBias | Tensor | None, q: Tensor, packed: bool, wanted: tuple[int, int, int, int]
) -> RelativeBias | Tensor | None:
    """The bias as given, a dense one with its missing leading dimensions added."""
    if bias is None:
        return None
    heads = q.shape[1]
    if isinstance(bias, RelativeBias):
        if bias.num_heads != heads:
            raise ValueError(f"bias: expected {heads} heads, as q has, got {bias.num_heads}")
        if bias.vector.device != q.device:
            raise ValueError(f"bias: expected the device of q, {q.device}, got {bias.vector.device}")
        return bias
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise TypeError("bias: expected None, a RelativeBias or a floating-point tensor")
    if bias.dim() > 4:
        raise ValueError(f"bias: expected a shape that broadcasts to {wanted}, got {tuple(bias.shape)}")
    if bias.device != q.device:
        raise ValueError(f"bias: expected the device of q, {q.device}, got {bias.device}")
    bias = bias[(None,) * (4 - bias.dim())]
    fits = all(have in (1, want) for have, want in zip(bias.shape, wanted))
    if not fits or (packed and bias.shape[2:] != wanted[2:]):
        raise ValueError(f"bias: expected a shape that broadcasts to {wanted}, got {tuple(bias.shape)}")
    return bias
