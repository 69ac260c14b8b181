"""Gated GELU in Triton: one pass forward, one backward, nothing kept but the inputs (specification: geglu.py)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat5.ops.eager import is_unobserved, undispatched
from fat5.ops.triton.launch import Launch, as_rows, run
from fat5.ops.triton.numerics import round_to

LAUNCH = Launch(1, 1024, 4, 1)
# 2 sqrt(2/pi), and the cubic share: gelu(x) = x sigmoid(SLOPE2 (x + CUBIC x^3)).
SLOPE2: tl.constexpr = tl.constexpr(1.5957691216057308)
CUBIC: tl.constexpr = tl.constexpr(0.044715)
# Beyond, gelu is 0 or x to the last bit; held here, cubes and squares stay finite.
FAR: tl.constexpr = tl.constexpr(100.0)


@triton.jit
def gelu_share(x):
    """sigmoid(SLOPE2 (x + CUBIC x^3)) = gelu(x) / x and its complement, neither with cancellation."""
    held = tl.minimum(tl.maximum(x, -FAR), FAR)
    inner = SLOPE2 * held * (1.0 + CUBIC * held * held)
    # exp of a magnitude is at most 1.
    small = tl.exp(-tl.abs(inner))
    less, more = small / (1.0 + small), 1.0 / (1.0 + small)
    return tl.where(inner >= 0, more, less), tl.where(inner >= 0, less, more), held


# `columns` is specialised on: knowing it as a multiple of 16 keeps masked loads 16 bytes wide.
@triton.jit(do_not_specialize=["blocks"])
def geglu_forward_kernel(Gate, Up, Out, gate_stride, up_stride, columns, blocks, BLOCK: tl.constexpr):
    """A program owns BLOCK columns of a row."""
    program = tl.program_id(0)
    row = tl.cast(program // blocks, tl.int64)
    column = tl.cast(program % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    gate = tl.load(Gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(Up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    share, _, _ = gelu_share(gate)
    tl.store(Out + row * columns + column, round_to(gate * share * up, Out.dtype.element_ty), mask=mask)


# `columns` is specialised on: knowing it as a multiple of 16 keeps masked loads 16 bytes wide.
@triton.jit(do_not_specialize=["blocks"])
def geglu_backward_kernel(
    GradOut, Gate, Up, GradGate, GradUp, grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride,
    columns, blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same, of both gradients: gelu' = s + x s (1 - s) SLOPE2 (1 + 3 CUBIC x^2)."""
    program = tl.program_id(0)
    row = tl.cast(program // blocks, tl.int64)
    column = tl.cast(program % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    grad = tl.load(GradOut + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(Gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(Up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    share, rest, held = gelu_share(gate)
    slope = share + held * share * rest * SLOPE2 * (1.0 + 3.0 * CUBIC * held * held)
    tl.store(
        GradGate + row * grad_gate_stride + column, round_to(grad * up * slope, GradGate.dtype.element_ty), mask=mask
    )
    tl.store(GradUp + row * grad_up_stride + column, round_to(grad * gate * share, GradUp.dtype.element_ty), mask=mask)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up."""
    return (_gate_eagerly if is_unobserved(gate, up) else geglu_forward)(gate, up)  # type: ignore[no-any-return]


@torch.library.custom_op("fat5::triton_geglu", mutates_args=())
def geglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """The same, as an operator."""
    return _gated(gate, up)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    out = _empty_out(gate, up)
    _forward(*_rows(gate, up), out)
    return out


@geglu_forward.register_fake
def _empty_out(gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@torch.library.custom_op("fat5::triton_geglu_backward", mutates_args=())
def geglu_backward(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and of up."""
    return _gated_gradients(grad_out, gate, up)


def _gated_gradients(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grads = _empty_grads(grad_out, gate, up)
    rows = _rows(grad_out, gate, up)
    _backward(*rows, *(grad.view(rows[0].shape) for grad in grads))
    return grads


@geglu_backward.register_fake
def _empty_grads(grad_out, gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@torch.library.custom_op("fat5::triton_geglu_joined", mutates_args=())
def geglu_joined_forward(joined: Tensor) -> Tensor:
    """gelu_tanh(first half) * second half, of the last dimension."""
    out = _empty_half(joined)
    _forward(*as_rows(joined).chunk(2, dim=-1), out)
    return out


@geglu_joined_forward.register_fake
def _empty_half(joined):  # type: ignore[no-untyped-def]
    return joined.new_empty((*joined.shape[:-1], joined.shape[-1] // 2))


@torch.library.custom_op("fat5::triton_geglu_joined_backward", mutates_args=())
def geglu_joined_backward(grad_out: Tensor, joined: Tensor) -> Tensor:
    """The gradient of both halves, joined: nothing is copied together afterwards."""
    grad = joined.new_empty(joined.shape)
    halves, grads = (as_rows(x).chunk(2, dim=-1) for x in (joined, grad))
    _backward(as_rows(grad_out), *halves, *grads)
    return grad


@geglu_joined_backward.register_fake
def _(grad_out, joined):  # type: ignore[no-untyped-def]
    return joined.new_empty(joined.shape)


def _forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """gate and up as rows of one shape; out is dense."""
    arguments = {"Gate": gate, "Up": up, "Out": out, "gate_stride": gate.stride(0), "up_stride": up.stride(0)}
    _run(geglu_forward_kernel, gate, arguments)


def _backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """All as rows of one shape."""
    _run(
        geglu_backward_kernel,
        gate,
        {
            "GradOut": grad, "Gate": gate, "Up": up, "GradGate": grad_gate, "GradUp": grad_up,
            "grad_stride": grad.stride(0), "gate_stride": gate.stride(0), "up_stride": up.stride(0),
            "grad_gate_stride": grad_gate.stride(0), "grad_up_stride": grad_up.stride(0),
        },
    )  # fmt: skip


def _run(kernel: Any, rows: Tensor, arguments: dict[str, Any]) -> None:
    blocks = triton.cdiv(rows.shape[1], LAUNCH.block_n)
    sizes = {"columns": rows.shape[1], "blocks": blocks}
    run(kernel, rows.shape[0] * blocks, arguments | sizes, {"BLOCK": LAUNCH.block_n}, LAUNCH)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Each as (rows, columns) with unit stride along columns; as one long row where all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_out):  # type: ignore[no-untyped-def]
    gate, up = ctx.saved_tensors
    return (_gated_gradients if is_unobserved(grad_out, gate, up) else geglu_backward)(grad_out, gate, up)


def _joined_gradient(ctx, grad_out):  # type: ignore[no-untyped-def]
    return geglu_joined_backward(grad_out, *ctx.saved_tensors)


geglu_forward.register_autograd(_gradients, setup_context=_save)
_gate_eagerly = undispatched(_gated, _save, _gradients)
geglu_joined_forward.register_autograd(_joined_gradient, setup_context=_save)
