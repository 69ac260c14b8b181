"""Attention in plain PyTorch: the specification that every other backend is tested against. Quadratic memory."""

import torch
from torch import Tensor

from fat5.ops.attention.bias import RelativeBias
from fat5.ops.attention.dropout import keep_mask


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias | Tensor | None,
    *,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """softmax(scale * q k^T + bias, masked) v, in float32 at least; shapes as in `fat5.ops.attention`."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        rows = [
            _one(
                q[b : b + 1],
                k[b : b + 1],
                v[b : b + 1],
                bias if not isinstance(bias, Tensor) or bias.dim() < 4 or bias.shape[0] == 1 else bias[b : b + 1],
                causal,
                scale,
                dropout_p,
                seed,
                b,
                None if key_padding_mask is None else key_padding_mask[b],
            )
            for b in range(q.shape[0])
        ]
        return torch.cat(rows) if rows else zeros(q)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    pieces = []
    for n in range(len(starts_q) - 1):
        rows_q, rows_k = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])
        document_bias = bias
        if isinstance(bias, Tensor):
            document_bias = bias[n if bias.shape[0] > 1 else 0][
                None, :, : rows_q.stop - rows_q.start, : rows_k.stop - rows_k.start
            ]
        one_q, one_k, one_v = (x[rows].transpose(0, 1)[None] for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
        out = _one(one_q, one_k, one_v, document_bias, causal, scale, dropout_p, seed, n, None)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat([*pieces, zeros(q[starts_q[-1] :])])


def zeros(q: Tensor) -> Tensor:
    """The output of queries that belong to no document: zeros, whose gradient for q is zeros and not None."""
    return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias | Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    document: int,
    visible: Tensor | None,
) -> Tensor:
    """One document: q (1, H, Lq, D), k and v (1, H, Lk, D), `visible` (Lk,) bool."""
    if visible is not None:
        # What stands in padding may be NaN, and 0 * NaN would spread it.
        k, v = (x.masked_fill(~visible[:, None], 0.0) for x in (k, v))
    weights = _weights(q, k, bias, causal, scale, visible)
    if dropout_p > 0.0 and seed is not None:
        keep = keep_mask(seed, dropout_p, document, q.shape[1], range(q.shape[2]), range(k.shape[2]))
        weights = weights * keep[None].to(weights.dtype) / (1.0 - dropout_p)
    return (weights @ v.to(weights.dtype)).to(q.dtype)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    bias: RelativeBias | Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias, masked): the weights (B, H, Lq, Lk) themselves, in float32 at least.

    Quadratic memory: for looking at, and the plain formula of stock T5. Arguments as in `fat5.ops.attention`, rows
    only. A query that sees no key weighs all keys alike, hidden ones too, as in stock T5, which adds the lowest finite
    number to the scores of hidden keys; gradients are those of that sum.
    """
    visible = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if key_padding_mask is not None:
        # What stands in padding may be NaN.
        k = torch.where(key_padding_mask[:, None, :, None], k, k.nan_to_num(0.0, 0.0, 0.0))
    scores = _scores(q, k, scale)
    added = torch.zeros((), dtype=scores.dtype, device=q.device) if bias is None else _dense(bias, scores)
    hidden = _hidden(scores, causal, visible)
    return torch.softmax(scores + torch.where(hidden, torch.finfo(scores.dtype).min, added), dim=-1)


def _weights(
    q: Tensor, k: Tensor, bias: RelativeBias | Tensor | None, causal: bool, scale: float, visible: Tensor | None
) -> Tensor:
    """(B, H, Lq, Lk); `visible` is bool and broadcasts to that. A query that sees no key gets zeros."""
    scores = _scores(q, k, scale)
    if bias is not None:
        scores = scores + _dense(bias, scores)
    hidden = _hidden(scores, causal, visible)
    scores = scores.masked_fill(hidden, float("-inf"))
    # A row that sees nothing, because of masks or of a dense bias, is all -inf, whose softmax is NaN forward and
    # backward: let it see everything, then zero it.
    blind = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind | hidden, 0.0)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    compute = torch.promote_types(q.dtype, torch.float32)
    return scale * (q.to(compute) @ k.to(compute).transpose(-1, -2))


def _dense(bias: RelativeBias | Tensor, scores: Tensor) -> Tensor:
    dense = bias.dense(scores.shape[-2], scores.shape[-1]) if isinstance(bias, RelativeBias) else bias
    return dense.to(scores.dtype)


def _hidden(scores: Tensor, causal: bool, visible: Tensor | None) -> Tensor:
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    return hidden if visible is None else hidden | ~visible
