"""Rotary position embedding (Su et al. 2021): pairs (i, i + n/2) of a head's first n dimensions turn by an angle."""

import torch
from torch import Tensor

from fat5.ops.choice import uses_triton


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a cos - b sin, b cos + a sin) of each pair (a, b), in x's precision; dimensions from n on stay."""
    cos, sin = (part[..., None, :].to(x.dtype) for part in (cos, sin))
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x (..., H, D) by the angles whose cosines and sines are given.

    Args:
        x: floating point, in its own strides.
        cos, sin: (..., n/2) with n <= D, float32, their leading dimensions those of x before H, or broadcast to them.
            No gradient reaches them through the Triton kernel; where they require one, plain PyTorch serves.

    Returns:
        Of x's shape and dtype.
    """
    if cos.shape != sin.shape or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos, sin: expected one shape (..., n/2) with n at most {x.shape[-1]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.shape[-1] and not (cos.requires_grad or sin.requires_grad) and uses_triton("rotary", x, cos, sin):
        from fat5.ops.triton.rotary import rotary_forward

        return rotary_forward(x, cos, sin, False)
    return rotary_reference(x, cos, sin)
