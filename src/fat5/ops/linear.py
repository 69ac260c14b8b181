"""Matrix products in float32 on the CPU, by oneDNN where it serves.

PyTorch multiplies float32 matrices with MKL, which uses half the width of an AMD processor's vector units; oneDNN, in
every PyTorch build for x86, uses all of it, and is 2.2 times as fast there. On Intel's own processors MKL is as fast,
and needs fewer copies: a training step is shorter by a quarter (docs/decisions/0100).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import register_flop_formula

from fat5.machine import is_intel
from fat5.ops.choice import is_recorded

# With fewer rows, starting oneDNN costs more than its speed saves.
FEWEST_ROWS = 64
# Asked once: torch.compile cannot trace the question.
ONEDNN = torch.backends.mkldnn.is_available() and not is_intel()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), (..., in) to (..., out), on the CPU in float32 by oneDNN.

    Anything but a plain, bias-free `nn.Linear` (LoRA, quantised, hooked) is called as it is.
    """
    if x.is_cuda or not is_plain(layer, nn.Linear) or layer.bias is not None:
        return layer(x)
    weight: Any = layer.weight
    if not serves(x.flatten(0, -2), weight):
        return layer(x)
    return _product(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], weight.shape[0])


def is_plain(layer: Any, *classes: type[nn.Module]) -> bool:
    """Whether `layer` is exactly one of `classes`, so that its weight may be read in place of a call.

    False for adapters (LoRA), for quantised and parametrized layers, and for hooked ones.
    """
    return type(layer) in classes and type(layer.weight) is nn.Parameter and not is_hooked(layer)


def is_hooked(layer: nn.Module) -> bool:
    """Whether a call does more than the class's forward: hooks, or a forward that was replaced (device_map)."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if "forward" in layer.__dict__ or any(getattr(layer, name) for name in hooks):
        return True
    return bool(torch_module._has_any_global_hook())


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices (m, k) and (k, n), by oneDNN where it serves."""
    return _product(a, b) if serves(a, b) else a @ b


def serves(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN multiplies these: float32 on an x86 CPU not by Intel, outside autocast, and large enough."""
    if is_recorded():  # asked before the number of rows, which would bind the graph to it
        return False
    return (
        a.device.type == b.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.shape[0] >= FEWEST_ROWS
        and ONEDNN
        and not torch.is_autocast_enabled("cpu")
    )


@torch.library.custom_op("fat5::product", mutates_args=())
def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, contiguous; each may be transposed."""
    multiply = torch.ops.mkldnn._linear_pointwise
    if a.stride(0) == 1 and a.shape[0] > b.shape[1]:
        # Gradients of weights: oneDNN is quicker where their matrix is wide than where it is tall.
        return multiply(b.t(), a, None, "none", [], "").t().contiguous()
    return multiply(a, b.t(), None, "none", [], "")


@_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@register_flop_formula(torch.ops.fat5.product)
def _flops(a_shape, b_shape, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    a, b = ctx.saved_tensors
    grad_a = _product(grad, b.t()) if ctx.needs_input_grad[0] else None
    grad_b = _product(grad.t(), a).t() if ctx.needs_input_grad[1] else None
    return grad_a, grad_b


_product.register_autograd(_gradients, setup_context=_save)
