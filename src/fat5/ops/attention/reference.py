"""Attention in plain PyTorch: the specification that every other backend is tested against. Quadratic memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from fat5.ops.attention.bias import RelativeBias
from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.dropout import keep_mask


def attention_reference(call: AttentionCall) -> Tensor:
    """softmax(scale * q k^T + bias, masked) v, in float32 at least."""
    if call.packed:
        return each_document(call, _one)
    q, k, v, dense, mask = call.q, call.k, call.v, call.dense, call.key_padding_mask
    rows = []
    for b in range(call.documents):
        row = slice(b, b + 1)
        own = dense if dense is None or dense.shape[0] == 1 else dense[row]
        visible = None if mask is None else mask[row]
        rows.append(_one(call._replace(q=q[row], k=k[row], v=v[row], dense=own, key_padding_mask=visible), b))
    return torch.cat(rows) if rows else zeros(q)


def each_document(call: AttentionCall, single: Callable[[AttentionCall, int], Tensor]) -> Tensor:
    """`single(padded call, n)` of every document n of a packed call, joined; rows of no document are zeros."""
    assert call.cu_seqlens_q is not None
    assert call.cu_seqlens_k is not None
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    pieces = []
    for n in range(call.documents):
        document = call.document(n, slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2]))
        pieces.append(single(document, n)[0].transpose(0, 1))
    return torch.cat([*pieces, zeros(call.q[starts_q[-1] :])])


def zeros(q: Tensor) -> Tensor:
    """The output of queries that belong to no document: zeros, whose gradient for q is zeros and not None."""
    return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)


def _one(call: AttentionCall, document: int) -> Tensor:
    """A padded call of one batch row; dropout draws its mask by the number of the document."""
    q, k, v, visible = call.q, call.k, call.v, call.key_padding_mask
    if visible is not None:
        # Padding may hold NaN, and 0 * NaN would spread it.
        k, v = (x.masked_fill(~visible[0, :, None], 0.0) for x in (k, v))
    weights = _weights(_scores(q, k, call.scale), call.dense_bias(), call.causal, visible)
    if call.dropout:
        assert call.seed is not None
        keep = keep_mask(call.seed, call.dropout_p, document, call.heads, range(q.shape[2]), range(k.shape[2]))
        weights = weights * keep[None].to(weights.dtype) / (1.0 - call.dropout_p)
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

    Quadratic memory: this is for inspection, and is the plain formula of stock T5. The arguments are those of
    `fat5.ops.attention`, padded only. A query that sees no key gives all keys the same weight, hidden ones too, as in
    stock T5, which adds the lowest finite number to the scores of hidden keys; gradients are those of that sum.
    """
    if key_padding_mask is not None:
        # Padding may hold NaN.
        k = torch.where(key_padding_mask[:, None, :, None], k, k.nan_to_num(0.0, 0.0, 0.0))
    scores = _scores(q, k, scale)
    dense = bias.dense(q.shape[2], k.shape[2]) if isinstance(bias, RelativeBias) else bias
    added = torch.zeros((), dtype=scores.dtype, device=q.device) if dense is None else dense.to(scores.dtype)
    hidden = _hidden(scores, causal, key_padding_mask)
    return torch.softmax(scores + torch.where(hidden, torch.finfo(scores.dtype).min, added), dim=-1)


def _weights(scores: Tensor, bias: Tensor | None, causal: bool, visible: Tensor | None) -> Tensor:
    """(B, H, Lq, Lk). A query that sees no key gets zeros."""
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    hidden = _hidden(scores, causal, visible)
    scores = scores.masked_fill(hidden, float("-inf"))
    # A row that sees nothing, because of masks or of a dense bias, is all -inf, whose softmax is NaN forward and
    # backward: let it see everything, then zero it.
    blind = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind | hidden, 0.0)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    compute = torch.promote_types(q.dtype, torch.float32)
    return scale * (q.to(compute) @ k.to(compute).transpose(-1, -2))


def _hidden(scores: Tensor, causal: bool, visible: Tensor | None) -> Tensor:
    """What causality and the mask `visible` (B, Lk) hide, bool, of a shape that broadcasts to that of the scores."""
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    return hidden if visible is None else hidden | ~visible[:, None, None, :]
