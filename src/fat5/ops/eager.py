"""Calls of our operators past PyTorch's dispatcher, which takes the host longer than many a kernel takes the GPU.

An operator of torch.library written in Python costs some 50 microseconds a call, and attention with its twenty
arguments 200 where gradients are wanted: in a model that is not compiled, the GPU then waits for the host. Where only
autograd would listen, the same two functions are called from an `autograd.Function`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_unobserved(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd listens to a call on these tensors: no compiler, mode, transform or subclass; and
    whether they have data."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
        and all(x is None or (type(x) in (Tensor, nn.Parameter) and not x.is_meta) for x in tensors)
    )


def undispatched(
    function: Callable[..., Any], save: Callable[..., None], gradients: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` with a gradient, as `register_autograd(gradients, setup_context=save)` gives it to an operator; a
    second derivative raises RuntimeError.
    """

    class Undispatched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradients(ctx, *grads)

    def call(*inputs: Any) -> Any:
        return Undispatched.apply(*inputs) if torch.is_grad_enabled() else function(*inputs)

    return call
