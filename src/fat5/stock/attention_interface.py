"""`attn_implementation="fat5"`: our attention under transformers' interface, for stock models left as they are.

A stock T5 makes its dense (1, H, Lq, Lk) bias before it calls attention. This file only avoids reading all of it: a
bias that depends on distance is known from its first row and column. `fat5.accelerate` makes no dense bias at all.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fat5 import ops
from fat5.ops import RelativeBias

NAME = "fat5"


def register() -> None:
    """Makes `attn_implementation="fat5"` known; without its mask function transformers would drop every mask."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **how: Any,
) -> Tensor | None:
    """The keys to attend to: None for all, (B, Lk) bool, or (B, 1, Lq, Lk) bool.

    The first two leave causality to `module.is_causal`, which is right while queries and keys start together. The mask
    has four dimensions with a cache, where they do not; if it leaves a query without a key; and in every recorded
    graph. Attention is then sdpa's, where a query without a key attends to all keys alike.
    """
    causal = mask_function is causal_mask_function
    together = isinstance(q_offset, int) and q_offset == kv_offset == 0 and not ops.is_recorded()
    fits = attention_mask is None or attention_mask.shape == (batch_size, kv_length)
    if together and fits and ((causal and q_length == kv_length) or mask_function is bidirectional_mask_function):
        if attention_mask is None:
            return None
        seen = (attention_mask[:, :1] if causal else attention_mask).any(dim=1).all()
        everything, every_query = torch.stack([attention_mask.all(), seen]).tolist()
        if everything or every_query:
            return None if everything else attention_mask.bool()
    how |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **how)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (B, H, Lq, D), key and value (B, H, Lk, D) to (B, Lq, H, D); weights are never formed."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias
        )  # type: ignore[return-value]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    crosses = getattr(module, "is_decoder", False) and not getattr(module, "is_causal", False)
    # In cross-attention a stock T5 adds zeros.
    bias = None if crosses or position_bias is None else _of_distances(position_bias)
    out = ops.attention(
        query, key, value, bias=bias, dropout_p=dropout, key_padding_mask=attention_mask,
        causal=bool(getattr(module, "is_causal", False) if is_causal is None else is_causal),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )  # fmt: skip
    return out.transpose(1, 2), None


def _of_distances(dense: Tensor) -> RelativeBias:
    """The (H, 2R+1) vector of a (1, H, Lq, Lk) bias that depends on the distance alone: its first column from below,
    then its first row.
    """
    _, _, queries, keys = dense.shape
    reach = max(queries, keys) - 1
    before, after = dense[0, :, 1:, 0].flip(-1), dense[0, :, 0]
    vector = torch.nn.functional.pad(torch.cat([before, after], dim=-1), (reach - queries + 1, reach - keys + 1))
    return RelativeBias(vector)
