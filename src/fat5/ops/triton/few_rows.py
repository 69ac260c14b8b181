"""A decoding step in Triton: eight kernels a layer, where PyTorch launches several times as many (specification:
ops/few_rows.py).

A step reads each weight once for a few rows: its time is that of the launches and of the weights' bytes. So a
projection takes the norm before it and the gate, residual or argmax behind it along, and attention writes the new key
and value, reads the bias where it is kept, and stops at the position that it finds on the device: one recording serves
every position.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat5.ops.triton.geglu import gelu_share
from fat5.ops.triton.launch import Launch, run
from fat5.ops.triton.numerics import dot, round_to

# Outputs of a program: few, so that all multiprocessors read weights; more where there are many outputs.
OUTPUTS, MANY_OUTPUTS, MANY = 16, 64, 8192
# Rows of a program, at least 16 for the tensor cores and at most:
MOST_ROWS = 64
# Bytes of a row of weights at a time, half as many in tiles above 16 x OUTPUTS, and keys.
WEIGHT_BYTES, KEYS = 512, 64
WARPS, STAGES = 4, 4
NONE: tl.constexpr = tl.constexpr(0)
GELU: tl.constexpr = tl.constexpr(1)
RELU: tl.constexpr = tl.constexpr(2)
KINDS = {"none": 0, "gelu": 1, "relu": 2}
# float16 overflows in T5's feed-forward; the reference clamps to this.
LARGEST_HALF = torch.finfo(torch.float16).max - 1000


@triton.jit(do_not_specialize=["rows", "eps", "scale", "limit"])
def project_kernel(
    X, Norm, Weight, Second, Residual, Out, Index, rows, outputs, eps, scale, limit,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, CLAMP: tl.constexpr, ARGMAX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N outputs of BLOCK_M rows. With ARGMAX it writes the largest of them and its index."""
    block = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    here, there = row < rows, column < outputs
    x_rows = X + tl.cast(row, tl.int64)[:, None] * WIDTH
    weights = tl.cast(column, tl.int64)[None, :] * WIDTH
    inverse = tl.zeros((BLOCK_M,), tl.float32) + 1.0
    if NORM:
        squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for first in range(0, WIDTH, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + k[None, :], mask=here[:, None] & (k < WIDTH)[None, :], other=0.0).to(tl.float32)
            squares += x * x
        inverse = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / WIDTH + eps)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    factor = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < WIDTH
        x = tl.load(x_rows + k[None, :], mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if NORM:
            # Rounded where T5 rounds.
            x = round_to(x * inverse[:, None], Norm.dtype.element_ty).to(tl.float32)
            x = x * tl.load(Norm + k, mask=inside, other=0.0).to(tl.float32)[None, :]
            x = round_to(x, Norm.dtype.element_ty).to(tl.float32) * scale
        x = round_to(x, Weight.dtype.element_ty)
        mask = inside[:, None] & there[None, :]
        total = dot(x, tl.load(Weight + weights + k[:, None], mask=mask, other=0.0), total, PRECISION)
        if GATED:
            factor = dot(x, tl.load(Second + weights + k[:, None], mask=mask, other=0.0), factor, PRECISION)
    if ACTIVATION == GELU:
        share, _, _ = gelu_share(total)
        total *= share
    if ACTIVATION == RELU:
        total = tl.maximum(total, 0.0)
    if GATED:
        total *= factor
    place = tl.cast(row, tl.int64)[:, None] * outputs + column[None, :]
    mask = here[:, None] & there[None, :]
    if ADD:
        total += tl.load(Residual + place, mask=mask, other=0.0).to(tl.float32)
    if CLAMP:
        total = tl.minimum(tl.maximum(total, -limit), limit)
    if ARGMAX:
        total = tl.where(there[None, :], total, float("-inf"))
        slot = row * tl.num_programs(0) + block
        tl.store(Out + slot, tl.max(total, 1), mask=here)
        tl.store(Index + slot, block * BLOCK_N + tl.argmax(total, 1), mask=here)
    else:
        tl.store(Out + place, round_to(total, Out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["capacity"])
def attend_token_kernel(
    Query, Keys, Values, Bias, Out, End, Ancestors, capacity,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BEAMS: tl.constexpr, BLOCK_T: tl.constexpr,
    OWN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A program owns a head of a row. OWN: `End` is the position of the new token, whose key and value it writes;
    otherwise the number of places of each item's memory."""
    row, head = tl.program_id(0), tl.program_id(1)
    item, beam = row // BEAMS, row % BEAMS
    d = tl.arange(0, BLOCK_D)
    inside = d < HEAD_DIM
    inner = HEADS * HEAD_DIM
    first = tl.cast(item * HEADS + head, tl.int64) * capacity
    if OWN:
        end = tl.load(End).to(tl.int32)
        start = Query + tl.cast(row, tl.int64) * 3 * inner + head * HEAD_DIM + d
        query = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        key = tl.load(start + inner, mask=inside, other=0.0)
        value = tl.load(start + 2 * inner, mask=inside, other=0.0)
        place = ((first + end) * BEAMS + beam) * HEAD_DIM + d
        tl.store(Keys + place, key, mask=inside)
        tl.store(Values + place, value, mask=inside)
        if head == 0:
            tl.store(Ancestors + tl.cast(row, tl.int64) * capacity + end, beam)
        by_distance = Bias + head * (2 * capacity - 1) + capacity - 1 - end
        highest = tl.sum(query * key.to(tl.float32), 0) + tl.load(by_distance + end).to(tl.float32)
        total = tl.sum(tl.zeros((BLOCK_D,), tl.float32), 0) + 1.0
        out = value.to(tl.float32)
    else:
        end = tl.load(End + item).to(tl.int32)
        start = Query + tl.cast(row, tl.int64) * inner + head * HEAD_DIM + d
        query = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        by_distance = Bias + tl.cast(item, tl.int64) * capacity
        out = tl.zeros((BLOCK_D,), tl.float32)
        total = tl.sum(out, 0)
        highest = total - float("inf")
    for begin in range(0, end, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        known = t < end
        slot = first + t
        if OWN:
            slot *= BEAMS
            if BEAMS > 1:
                slot += tl.load(Ancestors + tl.cast(row, tl.int64) * capacity + t, mask=known, other=0)
        entries = slot[:, None] * HEAD_DIM + d[None, :]
        mask = known[:, None] & inside[None, :]
        keys = tl.load(Keys + entries, mask=mask, other=0.0).to(tl.float32)
        scores = tl.sum(query[None, :] * keys, 1)
        if HAS_BIAS:
            scores += tl.load(by_distance + t, mask=known, other=0.0).to(tl.float32)
        scores = tl.where(known, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        weights, kept = tl.exp(scores - higher), tl.exp(highest - higher)
        values = tl.load(Values + entries, mask=mask, other=0.0).to(tl.float32)
        total = total * kept + tl.sum(weights, 0)
        out = out * kept + tl.sum(weights[:, None] * values, 0)
        highest = higher
    written = Out + tl.cast(row, tl.int64) * inner + head * HEAD_DIM + d
    tl.store(written, round_to(out / total, Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks", "width", "pad"])
def choose_kernel(
    Best, Index, Tokens, Written, Ended, Lengths, Stop, Position, blocks, width, pad,
    BLOCK: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """A program owns a row: the token with the largest logit, or padding behind an end."""
    row = tl.program_id(0)
    highest = tl.zeros((BLOCK,), tl.float32) - float("inf")
    token = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, blocks, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        best = tl.load(Best + row * blocks + n, mask=n < blocks, other=float("-inf"))
        index = tl.load(Index + row * blocks + n, mask=n < blocks, other=0)
        token = tl.where(best > highest, index, token)
        highest = tl.maximum(best, highest)
    # The first of equal ones, as in every block.
    largest = tl.max(highest, 0)
    chosen = tl.min(tl.where(highest == largest, token, 2147483647), 0).to(tl.int64)
    chosen = tl.where(largest == largest, chosen, 0)
    ended = tl.load(Ended + row)
    chosen = tl.where(ended != 0, tl.cast(pad, tl.int64), chosen)
    tl.store(Tokens + row, chosen)
    tl.store(Written + row * width + tl.load(Position) + 1, chosen)
    tl.store(Lengths + row, tl.load(Lengths + row) + tl.where(ended != 0, 0, 1))
    for n in tl.static_range(STOPS):
        ended = tl.where(chosen == tl.load(Stop + n), 1, ended)
    tl.store(Ended + row, ended)


def project(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    scale: float = 1.0,
    activation: str = "none",
    second: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`project_reference`; everything contiguous, products in weight's dtype, sums in float32.

    The result has `dtype`, weight's if None; with a residual the wider of theirs, and float16 is clamped.
    """
    if residual is not None:
        dtype = torch.promote_types(residual.dtype, weight.dtype)
    out = x.new_empty(len(x), len(weight), dtype=dtype or weight.dtype)
    clamps = residual is not None and out.dtype == torch.float16
    _project(x, weight, out, None, norm, eps, scale, activation, second, residual, clamps)
    return out


def largest_outputs(
    x: Tensor, weight: Tensor, *, norm: Tensor, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Of each block of outputs of `project`: the largest, (rows, blocks) float32, and its index, int32."""
    blocks = triton.cdiv(len(weight), _outputs(weight))
    best = x.new_empty(len(x), blocks, dtype=torch.float32)
    index = x.new_empty(len(x), blocks, dtype=torch.int32)
    _project(x, weight, best, index, norm, eps, scale, "none", None, None, False)
    return best, index


def attend_own(
    joined: Tensor, keys: Tensor, values: Tensor, bias: Tensor, position: Tensor, ancestors: Tensor
) -> Tensor:
    """`attend_own_reference`, with the position as a (1,) int64 tensor."""
    capacity, beams = keys.shape[2:4]
    return _attend(joined, keys, values, bias, position, ancestors, capacity, beams, own=True)


def attend_memory(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """`attend_memory_reference`; no place from ends (B,) int64, at least 1, on is read."""
    beams = len(query) // len(keys)
    return _attend(query, keys, values, bias, ends, ends, keys.shape[2], beams, own=False)


def choose(
    best: Tensor,
    index: Tensor,
    tokens: Tensor,
    written: Tensor,
    ended: Tensor,
    lengths: Tensor,
    stop: Tensor,
    position: Tensor,
    pad: int,
) -> None:
    """Greedy choice among what `largest_outputs` gave, in place.

    Args:
        tokens, lengths: (rows,) int64. ended: (rows,) int32. stop: (E,) int64, the tokens that end a row.
        written: (rows, capacity + 1) int64, filled at position + 1 with the token, or `pad` in a row that has ended.
    """
    run(
        choose_kernel,
        len(tokens),
        {
            "Best": best, "Index": index, "Tokens": tokens, "Written": written, "Ended": ended, "Lengths": lengths,
            "Stop": stop, "Position": position, "blocks": best.shape[1], "width": written.shape[1], "pad": pad,
        },
        {"BLOCK": 1024, "STOPS": len(stop)},
    )  # fmt: skip


def _outputs(weight: Tensor) -> int:
    # float32, multiplied exactly, would spill with more.
    many = MANY_OUTPUTS if weight.element_size() < 4 else MANY_OUTPUTS // 2
    return many if len(weight) >= MANY else OUTPUTS


def _project(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    index: Tensor | None,
    norm: Tensor | None,
    eps: float,
    scale: float,
    activation: str,
    second: Tensor | None,
    residual: Tensor | None,
    clamps: bool,
) -> None:
    (rows, width), outputs = x.shape, len(weight)
    block_m = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    block_n = _outputs(weight)
    # Whole, larger tiles would not fit into the shared memory of sm_86 and 89.
    weight_bytes = WEIGHT_BYTES if block_m == 16 and block_n == OUTPUTS else WEIGHT_BYTES // 2
    block_k = min(weight_bytes // weight.element_size(), max(16, triton.next_power_of_2(width)))
    exact = weight.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    missing: dict[str, Any] = {"Norm": norm, "Second": second, "Residual": residual, "Index": index}
    run(
        project_kernel,
        (triton.cdiv(outputs, block_n), triton.cdiv(rows, block_m)),
        {
            "X": x, "Weight": weight, "Out": out, **{name: x if y is None else y for name, y in missing.items()},
            "rows": rows, "outputs": outputs, "eps": eps, "scale": scale, "limit": LARGEST_HALF,
        },
        {
            "WIDTH": width, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "NORM": norm is not None,
            "ACTIVATION": KINDS[activation], "GATED": second is not None, "ADD": residual is not None,
            "CLAMP": clamps, "ARGMAX": index is not None, "PRECISION": "ieee" if exact else "tf32",
        },
        # At 64 rows another stage would not fit into the shared memory of sm_86 and 89.
        Launch(block_m, block_n, WARPS, STAGES - (block_m == MOST_ROWS)),
    )  # fmt: skip


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    end: Tensor,
    ancestors: Tensor,
    capacity: int,
    beams: int,
    *,
    own: bool,
) -> Tensor:
    heads, width = keys.shape[1], keys.shape[-1]
    out = query.new_empty(len(query), heads * width)
    run(
        attend_token_kernel,
        (len(query), heads),
        {
            "Query": query, "Keys": keys, "Values": values, "Bias": query if bias is None else bias, "Out": out,
            "End": end, "Ancestors": ancestors, "capacity": capacity,
        },
        {
            "HEADS": heads, "HEAD_DIM": width, "BLOCK_D": triton.next_power_of_2(width), "BEAMS": beams,
            "BLOCK_T": KEYS, "OWN": own, "HAS_BIAS": bias is not None,
        },
        Launch(1, KEYS, WARPS, 2),
    )  # fmt: skip
    return out
