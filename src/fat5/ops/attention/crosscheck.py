"""The same attention through PyTorch's own SDPA and FlexAttention, with a dense bias: cross-checks, not fast paths.

Neither knows packed documents, counter-based dropout, or rows that see nothing: packed calls run document by document,
and dropout is refused.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.reference import each_document, zeros


def attention_sdpa(call: AttentionCall) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention with a materialised mask."""
    return _run(call, "sdpa", _sdpa)


def attention_flex(call: AttentionCall) -> Tensor:
    """torch.nn.attention.flex_attention, which reads the dense bias in its score_mod (forward only on the CPU, where
    PyTorch has no backward).
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
    if call.q.device.type == "cpu" and needs_grad:
        raise RuntimeError("backend='flex' has no backward on the CPU; use backend='cpu'")
    return _run(call, "flex", _flex)


def _run(call: AttentionCall, name: str, attend: Callable[[AttentionCall, Tensor | None], Tensor]) -> Tensor:
    if call.dropout:
        raise RuntimeError(f"backend={name!r} draws other dropout masks than the specification; use dropout_p=0.0")

    def single(call: AttentionCall, _document: int = 0) -> Tensor:
        if call.q.shape[2] == 0 or call.k.shape[2] == 0:
            return zeros(call.q)
        if call.key_padding_mask is not None:
            # Padding may hold NaN, and 0 * NaN would spread it.
            hidden = ~call.key_padding_mask[:, None, :, None]
            call = call._replace(k=call.k.masked_fill(hidden, 0.0), v=call.v.masked_fill(hidden, 0.0))
        mask, blind = _mask(call, call.q.dtype if name == "sdpa" else torch.float32)
        out = attend(call, mask)
        return out if blind is None else out.masked_fill(blind, 0.0)

    return each_document(call, single) if call.packed else single(call)


def _sdpa(call: AttentionCall, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=call.scale)


def _flex(call: AttentionCall, mask: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if mask is None else score + mask[b, h, i, j]

    return flex_attention(call.q, call.k, call.v, score_mod=add_bias, scale=call.scale)  # type: ignore[arg-type,return-value]


def _mask(call: AttentionCall, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(B, H, Lq, Lk), added to the scores, and the rows that see nothing. The softmax of those would be NaN, so the
    mask lets them see everything."""
    bias, visible, rows = call.dense_bias(), call.key_padding_mask, (call.q.shape[2], call.k.shape[2])
    if bias is None and not call.causal and visible is None:
        return None, None
    mask = torch.zeros((), dtype=dtype, device=call.q.device) if bias is None else bias.to(dtype)
    if call.causal:
        mask = mask.masked_fill(torch.ones(rows, dtype=torch.bool, device=mask.device).triu(1), float("-inf"))
    if visible is not None:
        mask = mask.masked_fill(~visible[:, None, None, :], float("-inf"))
    mask = mask.expand(*call.q.shape[:2], *rows)
    blind = (mask == float("-inf")).all(dim=-1, keepdim=True)
    return mask.masked_fill(blind, 0.0), blind
