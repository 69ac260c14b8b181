"""Rotary position embedding in Triton: one read and one write of x; its backward turns the other way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat5.ops.triton.launch import Launch, run
from fat5.ops.triton.numerics import round_to

# Elements of one half of a tile.
TILE, WARPS = 1024, 4


@triton.jit(do_not_specialize=["rows", "heads"])
def rotary_kernel(
    X, Cos, Sin, Out, token_stride, head_stride, rows, heads, sign,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows (token, head)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None]
    # 64 bits: tokens * heads * D may pass 2^31.
    token = tl.cast(row // heads, tl.int64)[:, None]
    source = X + token * token_stride + tl.cast(row % heads, tl.int64)[:, None] * head_stride
    target = Out + tl.cast(row, tl.int64)[:, None] * (2 * HALF + REST)
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    mask = inside & (pair < HALF)
    cos = tl.load(Cos + token * HALF + pair, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(Sin + token * HALF + pair, mask=mask, other=0.0).to(tl.float32) * sign
    first = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    tl.store(target + pair, round_to(first * cos - second * sin, Out.dtype.element_ty), mask=mask)
    tl.store(target + HALF + pair, round_to(second * cos + first * sin, Out.dtype.element_ty), mask=mask)
    if REST > 0:
        other = tl.arange(0, BLOCK_REST)[None, :]
        kept = inside & (other < REST)
        tl.store(target + 2 * HALF + other, tl.load(source + 2 * HALF + other, mask=kept, other=0.0), mask=kept)


@torch.library.custom_op("fat5::triton_rotary", mutates_args=())
def rotary_forward(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x turned by the angles of cos and sin, or back."""
    heads, width = x.shape[-2:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    half = cos.shape[-1]
    cos, sin = (part.expand(*x.shape[:-2], half).reshape(-1, half).contiguous() for part in (cos, sin))
    rows = x.reshape(-1, heads, width)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    block, rest = triton.next_power_of_2(half), width - 2 * half
    launch = Launch(max(1, TILE // block), block, WARPS, 1)
    constants = {"HALF": half, "BLOCK_HALF": block, "REST": rest, "BLOCK_REST": triton.next_power_of_2(max(1, rest))}
    run(
        rotary_kernel,
        triton.cdiv(rows.shape[0] * heads, launch.block_m),
        {
            "X": rows, "Cos": cos, "Sin": sin, "Out": out, "token_stride": rows.stride(0),
            "head_stride": rows.stride(1), "rows": rows.shape[0] * heads, "heads": heads,
            "sign": -1.0 if inverse else 1.0,
        },
        constants | {"BLOCK_M": launch.block_m},
        launch,
    )  # fmt: skip
    return out


@rotary_forward.register_fake
def _(x, cos, sin, inverse):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_out):  # type: ignore[no-untyped-def]
    return rotary_forward(grad_out, *ctx.saved_tensors, not ctx.inverse), None, None, None


rotary_forward.register_autograd(_backward, setup_context=_save)
