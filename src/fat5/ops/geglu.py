"""Gated GELU, the feed-forward activation of T5 v1.1 (Shazeer 2020), with the tanh form of GELU."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fat5.ops.choice import is_recorded, uses_triton

# gelu(x) = x/2 (1 + tanh(SLOPE (x + CUBIC x^3))) = x sigmoid(2 SLOPE (x + CUBIC x^3))
SLOPE, CUBIC = math.sqrt(2.0 / math.pi), 0.044715
# Entries worked on at a time on the CPU: they stay in cache from one step to the next.
CHUNK_ENTRIES = 1 << 17


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), spelled out."""
    inner = SLOPE * (gate + CUBIC * gate.pow(3))
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, elementwise; both of one shape, which is the result's."""
    if gate.shape != up.shape:
        raise ValueError(f"up: expected the shape of gate, {tuple(gate.shape)}, got {tuple(up.shape)}")
    if is_recorded():
        return F.gelu(gate, approximate="tanh") * up
    if uses_triton("geglu", gate, up):
        from fat5.ops.triton import geglu as triton_geglu

        return triton_geglu.geglu(gate, up)
    chunked = (
        gate.device.type == "cpu" and gate.dtype == up.dtype == torch.float32 and not torch.compiler.is_compiling()
    )
    return _ChunkedGEGLU.apply(gate, up) if chunked else _GEGLU.apply(gate, up)


def geglu_joined(joined: Tensor) -> Tensor:
    """gelu_tanh(first half) * second half of the last dimension, which must be even: of one wide projection.

    Its gradient comes joined as well, so that the projection's backward needs no copy.
    """
    if joined.shape[-1] % 2:
        raise ValueError(f"joined: expected an even last dimension, got {tuple(joined.shape)}")
    if uses_triton("geglu_joined", joined):
        from fat5.ops.triton.geglu import geglu_joined_forward

        return geglu_joined_forward(joined)
    return geglu(*joined.chunk(2, dim=-1))


class _GEGLU(torch.autograd.Function):
    """Computes gelu(gate) again in backward: cheaper than keeping it, but on a CPU, whose tanh is slow, it is kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        activated = F.gelu(gate, approximate="tanh")
        ctx.save_for_backward(gate, up, *([activated] if gate.device.type == "cpu" else []))
        return activated * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, *kept = ctx.saved_tensors
        grad = grads[0]
        grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        # Under create_graph the derivative of what was kept would be missing.
        activated = kept[0] if kept and not torch.is_grad_enabled() else F.gelu(gate, approximate="tanh")
        return grad_gate, activated * grad


class _ChunkedGEGLU(torch.autograd.Function):
    """The same for float32 on the CPU, where PyTorch's tanh is slow: a sigmoid made of exp2, in chunks that stay in
    cache.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        gates, ups = gate.reshape(-1), up.reshape(-1)
        out = torch.empty_like(gates)
        for chunk in _chunks(len(gates)):
            x, result = gates[chunk], out[chunk]
            _exponential(x, result).add_(1.0).reciprocal_().mul_(x).mul_(ups[chunk])
        return out.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph, which writing in place cannot serve
            return _GEGLU.backward(ctx, *grads)
        gates, ups, outs = gate.reshape(-1), up.reshape(-1), grads[0].reshape(-1)
        grad_gate, grad_up = torch.empty_like(gates), torch.empty_like(gates)
        buffers = torch.empty(2, min(CHUNK_ENTRIES, len(gates)))
        for chunk in _chunks(len(gates)):
            x, grad, share, activated = gates[chunk], outs[chunk], grad_gate[chunk], grad_up[chunk]
            rest, inner = buffers[:, : len(x)]
            # With e = exp(-...): s = 1 / (1 + e), and 1 - s = e s without cancellation.
            torch.add(_exponential(x, rest), 1.0, out=share).reciprocal_()
            rest.mul_(share)
            torch.mul(x, share, out=activated)
            # gelu' = s + gelu (1 - s) 2 SLOPE (1 + 3 CUBIC x^2)
            torch.mul(x, x, out=inner).mul_(6.0 * SLOPE * CUBIC).add_(2.0 * SLOPE).mul_(activated)
            share.addcmul_(inner, rest).mul_(ups[chunk]).mul_(grad)
            activated.mul_(grad)
        return grad_gate.view(gate.shape), grad_up.view(gate.shape)


def _exponential(x: Tensor, out: Tensor) -> Tensor:
    """exp(-2 SLOPE (x + CUBIC x^3)) into `out`, held at 2^126 so that its products stay finite."""
    scale = -2.0 * SLOPE / math.log(2.0)
    torch.mul(x, x, out=out)
    return out.mul_(scale * CUBIC).add_(scale).mul_(x).clamp_(max=126.0).exp2_()


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_ENTRIES, length)) for start in range(0, length, CHUNK_ENTRIES)]
