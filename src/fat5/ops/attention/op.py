"""The registered pair of operators, fat5::attention and fat5::attention_backward, and the table of their backends.

A backend is a folder beside this file whose backend.py has four functions:

    unsupported(call)                           None, or why it cannot serve the call
    plan(call)                                  up to PLAN tensors that forward and backward both read. They depend only
                                                on what the layers of a stack share, and are made outside the operators,
                                                so that torch.compile makes them once for a whole stack.
    forward(call, plan)                         (out, lse), as `call.empty_like(q)` and `call.empty_lse()`
    backward(call, plan, grad_out, out, lse, bias_needs_grad)
                                                gradients of q, k, v and of the bias in its own shape (None unless
                                                asked for)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fat5.ops.attention.call import TENSORS, AttentionCall
from fat5.ops.attention.cpu import backend as cpu
from fat5.ops.attention.hopper import backend as hopper
from fat5.ops.attention.hopper import mixed
from fat5.ops.attention.triton import backend as triton
from fat5.ops.eager import is_unobserved, undispatched

BACKENDS = {"cpu": cpu, "triton": triton, "hopper": hopper, "mixed": mixed}
SELECTIVE: dict[str, Callable[[AttentionCall], bool]] = {
    "hopper": hopper.worthwhile,
    "mixed": lambda call: hopper.worthwhile(call, "mixed"),
}
"""Which calls "auto" gives to a backend that is not the best choice wherever it can serve."""
PLAN = 5

# The fields of an AttentionCall, then the plan.
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? vector, Tensor? dense, Tensor? key_padding_mask, Tensor? seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, float scale, float dropout_p, "
    + ", ".join(f"Tensor? plan_{n}" for n in range(PLAN))
)
_FIELDS = len(AttentionCall._fields)


def attend(call: AttentionCall, backend: str, shared: dict[Any, Any] | None = None) -> Tensor:
    """`call` through the registered operator; plans are kept in `shared`."""
    if call.scale <= 0.0:
        # Kernels look for the largest score of a row before they scale.
        q, scale = (call.q * 0.0, 1.0) if call.scale == 0.0 else (-call.q, -call.scale)
        call = call._replace(q=q, scale=scale)
    if call.vector is not None and call.vector.dtype != torch.float32:
        call = call._replace(vector=call.vector.float())
    tensors: Any = call[:TENSORS]
    run = _attend_eagerly if is_unobserved(*tensors) else attention_forward
    return run(backend, *call, *planned(call, backend, shared))[0]  # type: ignore[no-any-return]


def planned(call: AttentionCall, backend: str, shared: dict[Any, Any] | None = None) -> tuple[Tensor | None, ...]:
    """The backend's plan as the operators take it: PLAN tensors, or None where it has fewer."""
    if shared is None or torch.compiler.is_compiling():
        plan = BACKENDS[backend].plan(call)
        return *plan, *(None,) * (PLAN - len(plan))
    tensors = call.vector, call.cu_seqlens_q, call.cu_seqlens_k
    numbers = call.causal, call.scale, call.dropout_p > 0.0, call.dense is None, call.needs_grad
    key = (backend, *map(id, tensors), call.q.shape, call.k.shape, call.q.dtype, *numbers)
    if key not in shared:
        # The tensors too, so that their ids stay theirs.
        shared[key] = planned(call, backend), tensors
    return shared[key][0]  # type: ignore[no-any-return]


def _forward(backend, *arguments):  # type: ignore[no-untyped-def]
    return BACKENDS[backend].forward(AttentionCall(*arguments[:_FIELDS]), arguments[_FIELDS:])


@torch.library.custom_op(
    "fat5::attention", mutates_args=(), schema=f"(str backend, {_CALL}) -> (Tensor out, Tensor lse)"
)
def attention_forward(backend, *arguments):  # type: ignore[no-untyped-def]
    """The output, and the log-sum-exp, -inf where a query sees no key."""
    return _forward(backend, *arguments)


@attention_forward.register_fake
def _(_backend, *arguments):  # type: ignore[no-untyped-def]
    call = AttentionCall(*arguments[:_FIELDS])
    return call.empty_like(call.q), call.empty_lse()


def _backward(backend, grad_out, out, lse, bias_needs_grad, *arguments):  # type: ignore[no-untyped-def]
    call, plan = AttentionCall(*arguments[:_FIELDS]), arguments[_FIELDS:]
    *grads, grad_bias = BACKENDS[backend].backward(call, plan, grad_out, out, lse, bias_needs_grad)
    return *grads, lse.new_empty(0) if grad_bias is None else grad_bias


@torch.library.custom_op(
    "fat5::attention_backward",
    mutates_args=(),
    schema=f"(str backend, Tensor grad_out, Tensor out, Tensor lse, bool bias_needs_grad, {_CALL}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
)
def attention_backward(backend, grad_out, out, lse, bias_needs_grad, *arguments):  # type: ignore[no-untyped-def]
    """Gradients of q, k, v and of the bias in its own shape (empty unless asked for)."""
    return _backward(backend, grad_out, out, lse, bias_needs_grad, *arguments)


@attention_backward.register_fake
def _(_backend, _grad_out, _out, lse, bias_needs_grad, *arguments):  # type: ignore[no-untyped-def]
    call = AttentionCall(*arguments[:_FIELDS])
    bias = call.dense if call.vector is None else call.vector
    grad_bias = lse.new_empty(0) if bias is None or not bias_needs_grad else bias.new_empty(bias.shape)
    return *(call.empty_like(x) for x in (call.q, call.k, call.v)), grad_bias


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.backend, *arguments = inputs
    ctx.numbers = arguments[TENSORS:_FIELDS]
    ctx.save_for_backward(*output, *arguments[:TENSORS], *arguments[_FIELDS:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, _grad_lse):  # type: ignore[no-untyped-def]
    # Once: torch.utils.checkpoint refuses to recompute what is asked for again.
    out, lse, *saved = ctx.saved_tensors
    of_vector, of_dense = ctx.needs_input_grad[4:6]
    run = _backward if is_unobserved(grad_out, *saved) else attention_backward
    grad_q, grad_k, grad_v, grad_bias = run(
        ctx.backend, grad_out, out, lse, of_vector or of_dense, *saved[:TENSORS], *ctx.numbers, *saved[TENSORS:]
    )
    grad_biases = (grad_bias if of_vector else None, grad_bias if of_dense else None)
    return None, grad_q, grad_k, grad_v, *grad_biases, *(None,) * (_FIELDS + PLAN - 5)


attention_forward.register_autograd(_gradients, setup_context=_save)
_attend_eagerly = undispatched(_forward, _save, _gradients)
