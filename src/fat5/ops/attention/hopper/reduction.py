"""The gradient of the bias vector from what the hooks left: strips of 16 keys, summed in a fixed order.

Near (heads, strips, 2, width) holds at [distance + R] what one strip and one tile of queries sum to. A strip meets a
distance in two tiles of queries at most, neighbours, which have a slot each. Far (heads, strips, 2) holds the sums
beyond the reach, left and right. What no tile wrote is not read: a strip knows its first key (-1: no strip) and its
tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat5.ops.attention.bias import repeat_ends
from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.hopper.launch_table import KEYS, PADDING, STRIP, query_block
from fat5.ops.triton.launch import run

COLUMNS, ROWS, ROUNDS = 64, 16, 2
"""A program of the sums takes so many distances, and so many strips so many times."""


def plan(call: AttentionCall) -> tuple[Tensor | None, ...]:
    """The bias with its end values repeated, and for a packed call that learns it its strips."""
    if call.vector is None or call.vector.shape[1] == 1:
        # One number for all keys changes no softmax.
        return None, None
    table = repeat_ends(call.vector.detach(), PADDING)
    if not (call.packed and call.vector.requires_grad and torch.is_grad_enabled()):
        return table, None
    starts = (call.cu_seqlens_q, call.cu_seqlens_k)
    return table, strips_of(*starts, call.k.shape[0], query_block(call.head_dim))


@torch.library.custom_op(
    "fat5::hopper_strips",
    mutates_args=(),
    schema="(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt key_rows, int queries) -> Tensor",
)
def strips_of(cu_seqlens_q, cu_seqlens_k, key_rows, queries):  # type: ignore[no-untyped-def]
    """(strips, 2) int32: the first key of a strip in its document, -1 where there is none, and its tiles of queries.

    A document's strips begin where the package puts them: at its first row and 128 more for every document before it,
    rounded down to 128.
    """
    documents = cu_seqlens_k.shape[0] - 1
    strips = cu_seqlens_k.new_empty((_capacity(key_rows, documents), 2))
    run(
        strips_kernel,
        documents,
        {
            "StartsQ": cu_seqlens_q, "StartsK": cu_seqlens_k, "Strips": strips, "documents": documents,
            "capacity": strips.shape[0],
        },
        {"KEYS": KEYS, "STRIP": STRIP, "QUERIES": queries, "CHUNK": 256},
    )  # fmt: skip
    return strips


@strips_of.register_fake
def _(cu_seqlens_q, cu_seqlens_k, key_rows, _queries):  # type: ignore[no-untyped-def]
    return cu_seqlens_k.new_empty((_capacity(key_rows, cu_seqlens_k.shape[0] - 1), 2))


def _capacity(key_rows: int, documents: int) -> int:
    return (key_rows // KEYS + documents + 1) * (KEYS // STRIP)


def buffers(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Near and Far, not filled."""
    assert call.vector is not None
    heads, vector_width = call.vector.shape
    if call.packed:
        strips = _capacity(call.k.shape[0], call.documents)
    else:
        strips = triton.cdiv(call.k.shape[2], KEYS) * (KEYS // STRIP) * call.documents
    near = call.vector.new_empty((heads, strips, 2, triton.cdiv(vector_width, 32) * 32))
    return near, call.vector.new_empty((heads, strips, 2))


def vector_gradient(call: AttentionCall, strips: Tensor | None, near: Tensor, far: Tensor) -> Tensor:
    """(H, 2R+1) fp32."""
    assert call.vector is not None
    heads, vector_width = call.vector.shape
    count, width = near.shape[1], near.shape[3]
    chunks = triton.cdiv(count, ROWS * ROUNDS)
    partial = near.new_empty((heads, chunks, width))
    # Of a padded call: strips a batch row, and the tiles of queries that each of them meets.
    across, tiles, queries = 0, 0, query_block(call.head_dim)
    if not call.packed:
        across, tiles = count // call.documents, triton.cdiv(call.q.shape[2], queries)
    run(
        sums_kernel,
        (chunks, heads, triton.cdiv(width, COLUMNS)),
        {
            "Near": near, "Far": far, "Strips": strips, "Partial": partial, "strips": count, "width": width,
            "across": across, "tiles": tiles, "R": vector_width // 2,
        },
        {
            "QUERIES": queries, "KEYS": KEYS, "STRIP": STRIP, "CAUSAL": call.causal, "PACKED": call.packed,
            "COLUMNS": COLUMNS, "ROWS": ROWS, "ROUNDS": ROUNDS,
        },
    )  # fmt: skip
    gradient = torch.empty_like(call.vector, memory_format=torch.contiguous_format)
    run(
        chunks_kernel,
        (heads, triton.cdiv(vector_width, COLUMNS)),
        {"Partial": partial, "Gradient": gradient, "chunks": chunks, "width": width, "vector_width": vector_width},
        {"COLUMNS": COLUMNS, "ROWS": ROWS},
    )
    return gradient


def clear_rows_of_no_document(starts: Tensor, *tensors: Tensor) -> None:
    """Zeros in the rows (tokens, heads, head_dim) behind the last document, which the package leaves as they were."""
    for x in tensors:
        run(
            clear_kernel,
            triton.cdiv(x.numel(), 8192),
            {"X": x, "Starts": starts, "documents": starts.shape[0] - 1, "width": x.stride(0), "total": x.numel()},
            {"BLOCK": 8192},
        )


@triton.jit(do_not_specialize=["documents", "capacity"])
def strips_kernel(
    StartsQ, StartsK, Strips, documents, capacity, KEYS: tl.constexpr, STRIP: tl.constexpr, QUERIES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """A program a document writes its strips, and -1 up to the next document's first."""
    document = tl.program_id(0)
    start = tl.load(StartsK + document)
    stop = tl.load(StartsK + document + 1)
    queries = tl.load(StartsQ + document + 1) - tl.load(StartsQ + document)
    first = (start // KEYS + document) * (KEYS // STRIP)
    after = (stop // KEYS + document + 1) * (KEYS // STRIP)
    after = tl.where(document == documents - 1, capacity, tl.minimum(after, capacity))
    own = (stop - start + KEYS - 1) // KEYS * (KEYS // STRIP)
    for chunk in range(first, after, CHUNK):
        strip = chunk + tl.arange(0, CHUNK)
        key = tl.where(strip - first < own, (strip - first) * STRIP, -1)
        tl.store(Strips + 2 * strip, key, mask=strip < after)
        tl.store(Strips + 2 * strip + 1, key * 0 + (queries + QUERIES - 1) // QUERIES, mask=strip < after)


@triton.jit(do_not_specialize=["strips", "across", "tiles", "R"])
def sums_kernel(
    Near, Far, Strips, Partial, strips, width, across, tiles, R, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    STRIP: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """Partial (heads, chunks, width): ROWS * ROUNDS strips summed; [0] and [2R] are the far sums."""
    chunk = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    distance = column - R
    inside = (distance > -R) & (distance < R)
    near = tl.zeros([COLUMNS], tl.float32)
    left = tl.zeros([ROWS], tl.float32)
    right = tl.zeros([ROWS], tl.float32)
    for turn in range(ROUNDS):
        strip = (chunk * ROUNDS + turn) * ROWS + tl.arange(0, ROWS)
        if PACKED:
            key = tl.load(Strips + 2 * strip, mask=strip < strips, other=-1)
            after = tl.load(Strips + 2 * strip + 1, mask=strip < strips, other=0)
        else:
            key = tl.where(strip < strips, strip % across * STRIP, -1)
            after = key * 0 + tiles
        exists = key >= 0
        before = key * 0
        if CAUSAL:
            before = key // KEYS * KEYS // QUERIES
        # Tiles of the queries that meet the strip's first and last key at this distance; 64 keeps them positive.
        query = key[:, None] - distance[None, :] + 64 * QUERIES
        first = query // QUERIES - 64
        last = (query + STRIP - 1) // QUERIES - 64
        written = exists[:, None] & inside[None, :]
        place = Near + (head * strips + strip)[:, None] * (2 * width) + column[None, :]
        is_first = written & (first >= before[:, None]) & (first < after[:, None])
        is_last = written & (last != first) & (last >= before[:, None]) & (last < after[:, None])
        sums = tl.load(place + (first & 1) * width, mask=is_first, other=0.0)
        sums += tl.load(place + (last & 1) * width, mask=is_last, other=0.0)
        near += tl.sum(sums, 0)
        place = Far + (head * strips + strip) * 2
        left += tl.load(place, mask=exists, other=0.0)
        right += tl.load(place + 1, mask=exists, other=0.0)
    near = tl.where(distance == -R, tl.sum(left, 0), tl.where(distance == R, tl.sum(right, 0), near))
    place = Partial + (head * tl.num_programs(0) + chunk) * width + column
    tl.store(place, near, mask=column < width)


@triton.jit(do_not_specialize=["chunks", "vector_width"])
def chunks_kernel(Partial, Gradient, chunks, width, vector_width, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Gradient (heads, 2R+1): Partial summed over its chunks."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)
        place = Partial + (head * chunks + row)[:, None] * width + column[None, :]
        inside = (row < chunks)[:, None] & (column < vector_width)[None, :]
        total += tl.sum(tl.load(place, mask=inside, other=0.0), 0)
    tl.store(Gradient + head * vector_width + column, total, mask=column < vector_width)


@triton.jit(do_not_specialize=["documents"])
def clear_kernel(X, Starts, documents, width, total, BLOCK: tl.constexpr):
    """Zeros from row Starts[documents] on; most programs have nothing to do."""
    first = tl.load(Starts + documents).to(tl.int64) * width
    here = tl.program_id(0).to(tl.int64) * BLOCK
    if here + BLOCK > first:
        place = here + tl.arange(0, BLOCK)
        tl.store(X + place, tl.zeros([BLOCK], X.dtype.element_ty), mask=(place >= first) & (place < total))
