"""Gated GELU, the feed-forward activation of T5 v1.1 (Shazeer 2020), with the tanh form of GELU."""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), spelled out."""
    inner = (2.0 / torch.pi) ** 0.5 * (gate + 0.044715 * gate.pow(3))
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, elementwise; both of one shape, which is the result's."""
    if gate.shape != up.shape:
        raise ValueError(f"up: expected the shape of gate, {tuple(gate.shape)}, got {tuple(up.shape)}")
    if gate.is_cuda and _triton_available():
        return import_module("fat5.ops.triton_geglu").geglu_triton(gate, up)
    return _GEGLU.apply(gate, up)


@lru_cache(maxsize=1)
def _triton_available() -> bool:
    return find_spec("triton") is not None and find_spec("fat5.ops.triton_geglu") is not None


class _GEGLU(torch.autograd.Function):
    """Saves its inputs only: gelu(gate) is computed again in backward, which costs less than keeping it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.gelu(gate, approximate="tanh") * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad = grads[0]
        grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return grad_gate, F.gelu(gate, approximate="tanh") * grad
