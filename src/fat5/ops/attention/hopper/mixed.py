"""Triton's forward and Hopper's backward, which share the log-sum-exp: the faster pair for packed documents.

flash-attn-4 makes a program for every tile that the documents could have and lets each seek its own; its forward is too
short to hide that. The plan: Triton's bias and forward work list, then Hopper's two tensors.
"""

from torch import Tensor

from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.hopper import backend as hopper
from fat5.ops.attention.triton import backend as triton


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    return triton.unsupported(call) or hopper.unsupported(call)


def plan(call: AttentionCall) -> tuple[Tensor | None, ...]:
    """What the forward of one and the backward of the other read."""
    return *triton.plan(_without_constant(call))[:2], *hopper.plan(call)


def forward(call: AttentionCall, plan: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """As op.py says."""
    return triton.forward(_without_constant(call), plan[:2])


def backward(
    call: AttentionCall,
    plan: tuple[Tensor | None, ...],
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As op.py says."""
    return hopper.backward(call, plan[2:], grad_out, out, lse, bias_needs_grad)


def _without_constant(call: AttentionCall) -> AttentionCall:
    """One number for all distances changes no softmax, but the log-sum-exp: Hopper's backward leaves it out, so the
    forward must."""
    is_constant = call.vector is not None and call.vector.shape[1] == 1
    return call._replace(vector=None) if is_constant else call
