"""RMSNorm in Triton; the specification is in ops/rms_norm.py.

A program of the forward kernel owns BLOCK_M rows; one of the backward kernel walks tiles of rows and keeps its share of
the weight's gradient in registers. The shares are summed in a fixed order: no atomics, the same bits at every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat5.ops.eager import is_unobserved, undispatched
from fat5.ops.triton.launch import Launch, architecture, as_rows, run
from fat5.ops.triton.numerics import round_to

# Elements of a tile: enough bytes in flight to keep HBM busy, few enough not to spill.
FORWARD_TILE, BACKWARD_TILE, WARPS = 4096, 2048, 4
# By architecture, where BACKWARD_TILE spills in its loop (sm_86 and sm_89: a row of 1,024 in bfloat16).
BACKWARD_TILES = {86: 1024, 89: 1024}
# Rows longer than this do not fit into one program's registers.
MAX_WIDTH = 1 << 13
# Programs of the backward kernel a multiprocessor, and how many in the interpreter.
PROGRAMS_A_PROCESSOR, PROGRAMS_INTERPRETED = 4, 3


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_norm_forward_kernel(
    X, Weight, Out, Inverse, x_stride, rows, eps,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Out = X / rms(X) * weight; Inverse = 1 / rms(X)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    # 64 bits: rows * WIDTH may pass 2^31.
    wide = tl.cast(row, tl.int64)[:, None]
    x = tl.load(X + wide * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / WIDTH + eps)
    weight = tl.load(Weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    out = x * inverse[:, None] * weight[None, :]
    tl.store(Out + wide * WIDTH + column[None, :], round_to(out, Out.dtype.element_ty), mask=mask)
    tl.store(Inverse + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    GradOut, X, Weight, Inverse, GradX, Partial, grad_stride, x_stride, rows,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """GradX = i g w - x i^3 sum(g w x) / d, Partial[program] = sum of g x i over its rows."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_N)
    weight = tl.load(Weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(program * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        wide = tl.cast(row, tl.int64)[:, None]
        x = tl.load(X + wide * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(GradOut + wide * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(Inverse + row, mask=row < rows, other=0.0)[:, None]
        normal = x * inverse
        total += grad * normal
        scaled = grad * weight[None, :]
        along = tl.sum(scaled * normal, 1)[:, None] / WIDTH
        result = inverse * (scaled - normal * along)
        tl.store(GradX + wide * WIDTH + column[None, :], round_to(result, GradX.dtype.element_ty), mask=mask)
    tl.store(Partial + program * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)


def serves(x: Tensor) -> bool:
    """Whether a row fits into one program."""
    return 1 <= x.shape[-1] <= MAX_WIDTH


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The normalised rows, of x's shape and dtype."""
    run = _normalise_eagerly if is_unobserved(x, weight) else rms_norm_forward
    return run(x, weight, eps)[0]  # type: ignore[no-any-return]


@torch.library.custom_op("fat5::triton_rms_norm", mutates_args=())
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised rows, of x's shape and dtype, and 1 / rms of each (rows,) float32."""
    return _forward(x, weight, eps)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, out = as_rows(x), x.new_empty(x.shape)
    inverse = x.new_empty(rows.shape[0], dtype=torch.float32)
    launch = _launch(x.shape[-1], FORWARD_TILE)
    run(
        rms_norm_forward_kernel,
        triton.cdiv(rows.shape[0], launch.block_m),
        {
            "X": rows, "Weight": weight.contiguous(), "Out": out, "Inverse": inverse,
            "x_stride": rows.stride(0), "rows": rows.shape[0], "eps": eps,
        },
        _constants(x, launch),
        launch,
    )  # fmt: skip
    return out, inverse


@rms_norm_forward.register_fake
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("fat5::triton_rms_norm_backward", mutates_args=())
def rms_norm_backward(grad_out: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weight."""
    return _backward(grad_out, x, weight, inverse)


def _backward(grad_out: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    rows, grad, grad_x = as_rows(x), as_rows(grad_out), x.new_empty(x.shape)
    launch = _launch(x.shape[-1], BACKWARD_TILES.get(architecture(x.device), BACKWARD_TILE))
    programs = min(triton.cdiv(rows.shape[0], launch.block_m), _programs(x.device))
    partial = x.new_empty((programs, x.shape[-1]), dtype=torch.float32)
    run(
        rms_norm_backward_kernel,
        programs,
        {
            "GradOut": grad, "X": rows, "Weight": weight.contiguous(), "Inverse": inverse, "GradX": grad_x,
            "Partial": partial, "grad_stride": grad.stride(0), "x_stride": rows.stride(0), "rows": rows.shape[0],
        },
        _constants(x, launch),
        launch,
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


@rms_norm_backward.register_fake
def _(grad_out, x, weight, inverse):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _launch(width: int, tile: int) -> Launch:
    block = triton.next_power_of_2(width)
    return Launch(max(1, min(16, tile // block)), block, max(WARPS, min(32, block // 256)), 1)


def _constants(x: Tensor, launch: Launch) -> dict[str, int]:
    return {"WIDTH": x.shape[-1], "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return PROGRAMS_A_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, _grad_inverse):  # type: ignore[no-untyped-def]
    x, weight, inverse = ctx.saved_tensors
    run = _backward if is_unobserved(grad_out, x, weight) else rms_norm_backward
    return *run(grad_out, x, weight, inverse), None


rms_norm_forward.register_autograd(_gradients, setup_context=_save)
_normalise_eagerly = undispatched(_forward, _save, _gradients)
