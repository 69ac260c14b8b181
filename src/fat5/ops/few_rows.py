"""What one decoding step does to a few rows, spelled out in plain PyTorch: the specification of the kernels in
ops/triton/few_rows.py, which a step on a GPU launches (generate/fused.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda x: x, "gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": torch.relu}


def project_reference(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    scale: float = 1.0,
    activation: str = "none",
    second: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + act(y weight^T) * (y second^T), with y = scale * x / rms(x) * norm.

    Args:
        x: (rows, d). weight, second: (outputs, d). norm: (d,), or None for y = x. residual: (rows, outputs).
        activation: a key of ACTIVATIONS.
    """
    if norm is not None:
        x = scale * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)) * norm
    out = ACTIVATIONS[activation](x @ weight.t())
    if second is not None:
        out = out * (x @ second.t())
    return out if residual is None else residual + out


def attend_own_reference(
    joined: Tensor, keys: Tensor, values: Tensor, bias: Tensor, position: int, ancestors: Tensor
) -> Tensor:
    """Self-attention of one new token a row, whose key and value go to their place.

    Args:
        joined: (B * n, 3 H D): query, key and value side by side.
        keys, values: (B, H, capacity, n, D), written at [:, :, position].
        bias: (H, 2 capacity - 1), by distance + capacity - 1.
        ancestors: (B, n, capacity): the slot of each beam's token at each earlier position; written at `position`.

    Returns:
        (B * n, H D).
    """
    items, heads, capacity, beams, width = keys.shape
    query, key, value = joined.view(items, beams, 3, heads, width).permute(2, 0, 3, 1, 4)
    keys[:, :, position], values[:, :, position] = key, value
    ancestors[:, :, position] = torch.arange(beams, device=joined.device)
    index = ancestors[:, None, :, : position + 1, None].expand(-1, heads, -1, -1, width).transpose(2, 3)
    mine, mine_too = (kept[:, :, : position + 1].gather(3, index) for kept in (keys, values))
    scores = torch.einsum("bhnd,bhtnd->bhnt", query, mine)
    scores = scores + bias[None, :, None, capacity - 1 - position : capacity]
    out = torch.einsum("bhnt,bhtnd->bnhd", torch.softmax(scores, dim=-1), mine_too)
    return out.reshape(items * beams, heads * width)


def attend_memory_reference(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Cross-attention of one token a row.

    Args:
        query: (B * n, H D). keys, values: (B, H, Lm, D). bias: (B, Lm), added to the scores.

    Returns:
        (B * n, H D).
    """
    items, heads, _, width = keys.shape
    rows = query.view(items, -1, heads, width).transpose(1, 2)
    scores = rows @ keys.transpose(2, 3)
    if bias is not None:
        scores = scores + bias[:, None, None]
    return (torch.softmax(scores, dim=-1) @ values).transpose(1, 2).reshape(query.shape)
