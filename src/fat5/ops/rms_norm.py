"""RMSNorm as T5 has it: no mean, no bias, statistics in float32 (Zhang & Sennrich 2019)."""

from typing import Any

import torch
from torch import Tensor

from fat5.ops.choice import is_recorded, uses_triton


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least; returns x's dtype."""
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    normal = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (weight.to(compute) * normal).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: (..., d) floating point.
        weight: (d,), of x's dtype or wider.
        eps: added to the mean square.

    Returns:
        Of x's shape and dtype; statistics and products are in float32 at least.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if is_recorded():
        return rms_norm_reference(x, weight, eps)
    if uses_triton("rms_norm", x, weight):
        from fat5.ops.triton import rms_norm as triton_rms_norm

        if triton_rms_norm.serves(x):
            return triton_rms_norm.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Six passes over the rows in backward where autograd makes twelve; the two reductions are matrix-vector
    products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = _inverse(wide, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        out = (wide * inverse) * weight.to(wide.dtype)
        # A cast that casts nothing would be a second name of the output, which PyTorch 2.11 compiles to a gradient of
        # zero (pytorch issue 180642).
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Under create_graph: what was saved is a constant, which a second derivative would not know.
            inverse = _inverse(x.to(inverse.dtype), ctx.eps)
        wide, grad = x.to(inverse.dtype).reshape(-1, width), grads[0].to(inverse.dtype).reshape(-1, width)
        inverse = inverse.reshape(-1, 1)
        scale = weight.to(inverse.dtype)
        product = grad * wide
        grad_weight = product.t().mv(inverse[:, 0])
        along = product.mv(scale)[:, None] * inverse.pow(3) / width
        grad_x = (grad * scale).mul(inverse).addcmul(wide, along, value=-1.0)
        return grad_x.to(x.dtype).view(x.shape), grad_weight.to(weight.dtype), None


def _inverse(wide: Tensor, eps: float) -> Tensor:
    """1 / rms of each row."""
    return torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1] + eps)
