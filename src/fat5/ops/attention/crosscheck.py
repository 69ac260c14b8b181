"""The same attention through PyTorch's own SDPA and FlexAttention, with the bias made dense: cross-checks, not fast
paths.

Neither knows packed documents, dropout by counters, or rows that see nothing: packed inputs run document by document,
and dropout is refused.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fat5.ops.attention.bias import RelativeBias
from fat5.ops.attention.reference import zeros

Single = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float], Tensor]


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | Tensor | None, **arguments) -> Tensor:  # type: ignore[no-untyped-def]
    """torch.nn.functional.scaled_dot_product_attention with a materialised mask."""
    return _each_document(_sdpa, "sdpa", q, k, v, bias, **arguments)


def attention_flex(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | Tensor | None, **arguments) -> Tensor:  # type: ignore[no-untyped-def]
    """torch.nn.attention.flex_attention reading the dense bias in its score_mod (on the CPU: forward only, PyTorch
    has no more).
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and needs_grad:
        raise RuntimeError("backend='flex' has no backward on the CPU; use backend='cpu'")
    return _each_document(_flex, "flex", q, k, v, bias, **arguments)


def _each_document(
    single: Single,
    name: str,
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
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_padding_mask: Tensor | None,
) -> Tensor:
    if dropout_p > 0.0:
        raise RuntimeError(f"backend={name!r} draws other dropout masks than the specification; use dropout_p=0.0")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        if key_padding_mask is not None:
            # What stands in padding may be NaN, and 0 * NaN would spread it.
            k, v = (x.masked_fill(~key_padding_mask[:, None, :, None], 0.0) for x in (k, v))
        hidden = _hidden(q.shape[2], k.shape[2], causal, key_padding_mask, q.device)
        dense = bias.dense(q.shape[2], k.shape[2]) if isinstance(bias, RelativeBias) else bias
        return single(q, k, v, dense, hidden, scale)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    pieces = []
    for n in range(len(starts_q) - 1):
        length_q, length_k = starts_q[n + 1] - starts_q[n], starts_k[n + 1] - starts_k[n]
        rows = slice(starts_q[n], starts_q[n + 1])
        if length_q == 0 or length_k == 0:
            pieces.append(zeros(q[rows]))
            continue
        document = [x.transpose(0, 1)[None] for x in (q[rows], *(x[starts_k[n] : starts_k[n + 1]] for x in (k, v)))]
        dense = bias.dense(length_q, length_k) if isinstance(bias, RelativeBias) else bias
        if isinstance(bias, Tensor):
            dense = bias[n if bias.shape[0] > 1 else 0][None, :, :length_q, :length_k]
        hidden = _hidden(length_q, length_k, causal, None, q.device)
        out = single(document[0], document[1], document[2], dense, hidden, scale)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat([*pieces, zeros(q[starts_q[-1] :])])


def _hidden(
    query_length: int, key_length: int, causal: bool, key_padding_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """(B|1, 1, Lq, Lk) bool, True = not to be seen; None when everything is."""
    hidden = None
    if causal:
        hidden = torch.ones(query_length, key_length, dtype=torch.bool, device=device).triu(1)[None, None]
    if key_padding_mask is not None:
        padding = ~key_padding_mask[:, None, None, :]
        hidden = padding if hidden is None else hidden | padding
    return hidden


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hidden: Tensor | None, scale: float) -> Tensor:
    mask, blind = _mask(q, k, bias, hidden, q.dtype)
    return _zero(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), blind)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hidden: Tensor | None, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if k.shape[2] == 0:
        return zeros(q)
    mask, blind = _mask(q, k, bias, hidden, torch.float32)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if mask is None else score + mask[b, h, i, j]

    return _zero(flex_attention(q, k, v, score_mod=add_bias, scale=scale), blind)  # type: ignore[arg-type]


def _mask(
    q: Tensor, k: Tensor, bias: Tensor | None, hidden: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, (B, H, Lq, Lk), and the rows that see nothing, which are let see everything: their
    softmax would be NaN."""
    if bias is None and hidden is None:
        return None, None
    mask = torch.zeros((), dtype=dtype, device=q.device) if bias is None else bias.to(dtype)
    mask = mask if hidden is None else mask.masked_fill(hidden, float("-inf"))
    mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    blind = (mask == float("-inf")).all(dim=-1, keepdim=True)
    return mask.masked_fill(blind, 0.0), blind


def _zero(out: Tensor, blind: Tensor | None) -> Tensor:
    return out if blind is None else out.masked_fill(blind, 0.0)
