"""The gradient of the bias: of a relative vector by walking diagonals, of a dense one in its own broadcast shape.

All tiles (m0, n0) with the same n0 - m0 share one pattern of distances, so a program that owns such an offset can add
its tiles of dS element by element in registers, in fp32, and store once; summing the diagonals of the stored tile is
then a small reduction. Every sum has a fixed order: the gradient is the same to the bit each time.
"""

import triton
import triton.language as tl

from fat5.ops.attention.triton.tiles import (
    DENSE,
    RELATIVE,
    SHAPE,
    at_document,
    bias_of,
    dense_tile,
    kept_tile,
    load_rows,
    locate,
    mask_of,
    relative_tile,
    rows_of,
    visible_tile,
)
from fat5.ops.triton.numerics import LOG2E, dot, round_to


@triton.jit
def _score_gradient(
    queries, keys, place, m0, n0,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(M, N) fp32: dS of one tile, unrounded; 0 where there is no query, no key, or the query does not see the key.

    Each operand is used once, so the head dimension is walked CHUNK_D at a time, and fp32 operands (split in three for
    TF32) need not be held whole.
    """
    bias, mask, query_length, key_length, scale, keep_scale = place
    if BIAS == RELATIVE:
        scores = relative_tile(bias, m0, n0, BLOCK_M, BLOCK_N, False)
    else:
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    grad_weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d0 in tl.static_range(0, BLOCK_D, CHUNK_D):
        q = load_rows(_from(queries[0], d0), m0, query_length, BLOCK_M, HEAD_DIM - d0, CHUNK_D, True)
        k = load_rows(_from(keys[0], d0), n0, key_length, BLOCK_N, HEAD_DIM - d0, CHUNK_D, True)
        scores = dot(q, tl.trans(k), scores, PRECISION)
        grad_out = load_rows(_from(queries[1], d0), m0, query_length, BLOCK_M, HEAD_DIM - d0, CHUNK_D, True)
        v = load_rows(_from(keys[1], d0), n0, key_length, BLOCK_N, HEAD_DIM - d0, CHUNK_D, True)
        grad_weights = dot(grad_out, tl.trans(v), grad_weights, PRECISION)
    if BIAS == DENSE:
        scores += dense_tile(bias, m0, n0, query_length, key_length, BLOCK_M, BLOCK_N, False) * (LOG2E / scale)
    exponent, delta = _row_statistics(queries, m0, query_length, BLOCK_M)
    return _difference(
        scores, grad_weights, exponent, delta, place, m0, n0, BLOCK_M, BLOCK_N, CAUSAL, HAS_KEY_MASK, DROPOUT
    )


@triton.jit
def _from(rows, d0):
    """The rows from dimension d0 on."""
    return rows[0] + d0 * rows[2], rows[1], rows[2]


@triton.jit
def _row_statistics(queries, m0, query_length, BLOCK_M: tl.constexpr):
    """Log-sum-exp in base 2 (+inf where there is no query) and delta, (M,) fp32 each."""
    rows = m0 + tl.arange(0, BLOCK_M)
    exponent = tl.load(queries[2] + rows, mask=rows < query_length, other=float("inf"))
    return exponent, tl.load(queries[3] + rows, mask=rows < query_length, other=0.0)


@triton.jit
def _difference(
    scores, grad_weights, exponent, delta, place, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dS = P * (dP - delta), masked."""
    bias, mask, query_length, key_length, scale, keep_scale = place
    visible = visible_tile(mask, m0, n0, key_length, BLOCK_M, BLOCK_N, CAUSAL, HAS_KEY_MASK)
    weights = tl.exp2(tl.where(visible, scores * scale, float("-inf")) - exponent[:, None])
    if DROPOUT:
        grad_weights = tl.where(kept_tile(mask, m0, n0, BLOCK_M, BLOCK_N, False), grad_weights * keep_scale, 0.0)
    grad_scores = weights * (grad_weights - delta[:, None])
    if HAS_KEY_MASK:
        # A padded key or value may be NaN.
        grad_scores = tl.where(visible, grad_scores, 0.0)
    return grad_scores


@triton.jit(do_not_specialize=[*SHAPE, "threshold", "slots", "splits", "offsets", "lowest"])
def band_kernel(
    Q, K, V, Bias, KeyMask, Seed, GradOut, Exponent, Delta, Partial, starts,
    q_strides, k_strides, v_strides, grad_out_strides, lse_strides, bias_strides, mask_strides,
    heads, query_rows, key_rows, num_documents, tiles, reach, slots, splits, offsets, lowest,
    scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FAR_M: tl.constexpr, FAR_N: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial (heads, offsets, splits, BLOCK_M, BLOCK_N) fp32: dS summed over the tiles with n0 - m0 = offset *
    BLOCK_N.

    A program serves GROUP offsets (at most three) with one load of the queries, and takes every `splits`-th slot of the
    work list. It leaves out the far (FAR_M, FAR_N) tiles, which the dQ pass summed. `lowest` is the offset of index 0.
    """
    shape = (heads, query_rows, key_rows, num_documents, tiles, reach)
    program = tl.program_id(0)
    split = program % splits
    head = program // splits % heads
    index = program // splits // heads * GROUP
    # The sum of each offset. Offsets beyond the last never meet a key.
    total0 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total1 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for slot in range(split, slots, splits):
        document, block, batch, query_start, query_length, key_start, key_length = locate(
            slot, starts, shape, PACKED, False
        )
        m0 = block * BLOCK_M
        if (document >= 0) & (key_length > 0):
            bias = bias_of(Bias, bias_strides, reach, head, document)
            mask = mask_of(KeyMask, mask_strides, Seed, threshold, head, batch, document)
            place = (bias, mask, query_length, key_length, scale, keep_scale)
            queries = (
                rows_of(Q, q_strides, batch, head, query_start),
                rows_of(GradOut, grad_out_strides, batch, head, query_start),
                at_document(Exponent, lse_strides, batch, head, query_start),
                at_document(Delta, lse_strides, batch, head, query_start),
            )
            rows = queries
            if CHUNK_D == BLOCK_D:
                q = load_rows(queries[0], m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D, True)
                grad_out = load_rows(queries[1], m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D, True)
                exponent, delta = _row_statistics(queries, m0, query_length, BLOCK_M)
                rows = (q, grad_out, exponent, delta)
            keys = (rows_of(K, k_strides, batch, head, key_start), rows_of(V, v_strides, batch, head, key_start))
            total0 = _add_near(
                total0, index, offsets, lowest, rows, keys, place, m0,
                HEAD_DIM, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, FAR_M, FAR_N, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
            )  # fmt: skip
            if GROUP > 1:
                total1 = _add_near(
                    total1, index + 1, offsets, lowest, rows, keys, place, m0,
                    HEAD_DIM, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, FAR_M, FAR_N, CAUSAL, HAS_KEY_MASK, DROPOUT,
                    PRECISION,
                )  # fmt: skip
            if GROUP > 2:
                total2 = _add_near(
                    total2, index + 2, offsets, lowest, rows, keys, place, m0,
                    HEAD_DIM, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, FAR_M, FAR_N, CAUSAL, HAS_KEY_MASK, DROPOUT,
                    PRECISION,
                )  # fmt: skip
    place = (offsets, splits, head, split)
    _store_total(Partial, total0, index, place, BLOCK_M, BLOCK_N)
    if GROUP > 1:
        _store_total(Partial, total1, index + 1, place, BLOCK_M, BLOCK_N)
    if GROUP > 2:
        _store_total(Partial, total2, index + 2, place, BLOCK_M, BLOCK_N)


@triton.jit
def _add_near(
    total, index, offsets, lowest, rows, keys, place, m0,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FAR_M: tl.constexpr, FAR_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds dS of the tile at one offset to `total`: of its columns that the dQ pass left to the band.

    `rows` are the queries as loaded, or where to load them from when they are taken in chunks.
    """
    bias, mask, query_length, key_length, scale, keep_scale = place
    R = bias[1]
    n0 = m0 + (lowest + index) * BLOCK_N
    far_m = m0 // FAR_M * FAR_M
    # The first and the last tile of the dQ pass in this one. n0 may be negative: such tiles are none, whatever the
    # division rounds to.
    first_far = n0 // FAR_N * FAR_N
    last_far = (n0 + BLOCK_N - 1) // FAR_N * FAR_N
    near = (last_far + FAR_N - 1 - far_m > -R) & (first_far - (far_m + FAR_M - 1) < R)
    if (index < offsets) & (n0 >= 0) & (n0 < key_length) & near:
        if CHUNK_D == BLOCK_D:
            q, grad_out, exponent, delta = rows
            k = load_rows(keys[0], n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            v = load_rows(keys[1], n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            scores = dot(q, tl.trans(k), relative_tile(bias, m0, n0, BLOCK_M, BLOCK_N, False), PRECISION)
            grad_weights = dot(grad_out, tl.trans(v), None, PRECISION)
            grad_scores = _difference(
                scores, grad_weights, exponent, delta, place, m0, n0, BLOCK_M, BLOCK_N, CAUSAL, HAS_KEY_MASK, DROPOUT
            )
        else:
            grad_scores = _score_gradient(
                rows, keys, place, m0, n0,
                HEAD_DIM, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, RELATIVE, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
            )  # fmt: skip
        if BLOCK_N > FAR_N:
            # Two scalars say where the near columns begin and end. Triton's division rounds to zero.
            columns = n0 + tl.arange(0, BLOCK_N)
            before = far_m - R - FAR_N + 1
            begins = tl.where(before < 0, 0, before // FAR_N * FAR_N + FAR_N)
            ends = (far_m + FAR_M + R - 2) // FAR_N * FAR_N + FAR_N
            owned = (columns >= begins) & (columns < ends)
            grad_scores = tl.where(owned[None, :], grad_scores, 0.0)
        total += grad_scores
    return total


@triton.jit
def _store_total(Partial, total, index, place, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offsets, splits, head, split = place
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    here = Partial + ((tl.cast(head, tl.int64) * offsets + index) * splits + split) * (BLOCK_M * BLOCK_N)
    if index < offsets:
        tl.store(here + rows[:, None] * BLOCK_N + columns[None, :], total)


@triton.jit(do_not_specialize=["offsets", "splits"])
def diagonal_kernel(
    Partial, Diagonals, offsets, splits, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr
):
    """Diagonals (heads, width) fp32: Partial summed over splits and over the cells of one distance.

    Program (head, strip) owns BLOCK_N distances, the first of them (strip - OVERLAP + 1) * BLOCK_N beyond the lowest
    offset.
    """
    head = tl.program_id(0)
    strip = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    # Strip s crosses the tiles s - OVERLAP + 1 .. s. In the n-th of them lane t of row i is column t + i - n BLOCK_N.
    for index in range(tl.maximum(strip - OVERLAP + 1, 0), tl.minimum(strip + 1, offsets)):
        column = lane[None, :] + rows[:, None] - (index - strip + OVERLAP - 1) * BLOCK_N
        inside = (column >= 0) & (column < BLOCK_N)
        for split in range(0, splits):
            tile = Partial + ((tl.cast(head, tl.int64) * offsets + index) * splits + split) * (BLOCK_M * BLOCK_N)
            total += tl.sum(tl.load(tile + rows[:, None] * BLOCK_N + column, mask=inside, other=0.0), 0)
    tl.store(Diagonals + head * width + strip * BLOCK_N + lane, total)


@triton.jit(do_not_specialize=["width", "lowest_distance", "far_rows", "far_tiles", "heads", "R"])
def bins_kernel(
    Diagonals, FarSums, GradVector, width, lowest_distance, far_rows, far_tiles, heads, R, CHUNK: tl.constexpr
):
    """GradVector (heads, 2R+1) fp32: the diagonals as bins; the two end bins also take larger distances and the far
    tiles.

    FarSums (far_rows, heads, far_tiles, 2) comes from the dQ pass.
    """
    head = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    left = tl.zeros([CHUNK], tl.float32)
    right = tl.zeros([CHUNK], tl.float32)
    for chunk in range(0, width, CHUNK):
        distance = lowest_distance + chunk + lane
        value = tl.load(Diagonals + head * width + chunk + lane, mask=chunk + lane < width, other=0.0)
        left += tl.where(distance <= -R, value, 0.0)
        right += tl.where(distance >= R, value, 0.0)
    for row in range(0, far_rows):
        base = FarSums + 2 * (tl.cast(row, tl.int64) * heads + head) * far_tiles
        for chunk in range(0, far_tiles, CHUNK):
            inside = chunk + lane < far_tiles
            left += tl.load(base + 2 * (chunk + lane), mask=inside, other=0.0)
            right += tl.load(base + 2 * (chunk + lane) + 1, mask=inside, other=0.0)
    for chunk in range(0, 2 * R + 1, CHUNK):
        distance = chunk + lane - R
        position = distance - lowest_distance
        inside = (position >= 0) & (position < width) & (distance > -R) & (distance < R)
        value = tl.load(Diagonals + head * width + position, mask=inside, other=0.0)
        value = tl.where(distance == -R, tl.sum(left, 0), tl.where(distance == R, tl.sum(right, 0), value))
        tl.store(GradVector + head * (2 * R + 1) + chunk + lane, value, mask=chunk + lane < 2 * R + 1)


@triton.jit(do_not_specialize=[*SHAPE, "threshold", "sizes"])
def dense_gradient_kernel(
    Q, K, V, Bias, KeyMask, Seed, GradOut, Exponent, Delta, GradDense, starts,
    q_strides, k_strides, v_strides, grad_out_strides, lse_strides, bias_strides, grad_dense_strides, mask_strides,
    heads, query_rows, key_rows, num_documents, tiles, reach, sizes, scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GradDense, in the bias's own shape: a program owns one tile, and sums the dS of all tiles that read it.

    sizes = (documents, bias documents, bias heads, rows, columns); ONE_ROW and ONE_COLUMN say that the bias has a
    single row or column, so that the program also runs over all queries or all keys.
    """
    documents, bias_documents, bias_heads, bias_rows, bias_columns = sizes
    program = tl.program_id(0)
    across = tl.cdiv(bias_columns, BLOCK_N)
    down = tl.cdiv(bias_rows, BLOCK_M)
    tile_n = program % across
    tile_m = program // across % down
    bias_head = program // across // down % bias_heads
    bias_document = program // across // down // bias_heads
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for document in range(bias_document, documents, bias_documents):
        if PACKED:
            query_start, query_length, key_start, key_length = _document_of(starts, document, query_rows, key_rows)
            batch = 0
        else:
            query_start, query_length, key_start, key_length, batch = 0, query_rows, 0, key_rows, document
        stop_m = tl.cdiv(query_length, BLOCK_M) if ONE_ROW else tl.minimum(tile_m + 1, tl.cdiv(query_length, BLOCK_M))
        stop_n = tl.cdiv(key_length, BLOCK_N) if ONE_COLUMN else tl.minimum(tile_n + 1, tl.cdiv(key_length, BLOCK_N))
        for head in range(bias_head, heads, bias_heads):
            bias = bias_of(Bias, bias_strides, reach, head, document)
            mask = mask_of(KeyMask, mask_strides, Seed, threshold, head, batch, document)
            place = (bias, mask, query_length, key_length, scale, keep_scale)
            queries = (
                rows_of(Q, q_strides, batch, head, query_start),
                rows_of(GradOut, grad_out_strides, batch, head, query_start),
                at_document(Exponent, lse_strides, batch, head, query_start),
                at_document(Delta, lse_strides, batch, head, query_start),
            )
            keys = (rows_of(K, k_strides, batch, head, key_start), rows_of(V, v_strides, batch, head, key_start))
            for block_m in range(tile_m, stop_m):
                for block_n in range(tile_n, stop_n):
                    total += _score_gradient(
                        queries, keys, place, block_m * BLOCK_M, block_n * BLOCK_N,
                        HEAD_DIM, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, DENSE, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
                    )  # fmt: skip
    here = at_document(GradDense, grad_dense_strides, bias_document, bias_head, 0)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_ROW:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], [BLOCK_M, BLOCK_N])
    if ONE_COLUMN:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], [BLOCK_M, BLOCK_N])
    inside = (row < bias_rows)[:, None] & (column < bias_columns)[None, :]
    at = (
        tl.cast(row, tl.int64)[:, None] * grad_dense_strides[2]
        + tl.cast(column, tl.int64)[None, :] * grad_dense_strides[3]
    )
    tl.store(here + at, round_to(total, GradDense.dtype.element_ty), mask=inside)


@triton.jit
def _document_of(starts, document, query_rows, key_rows):
    work, starts_q, starts_k = starts
    query_start, query_stop = tl.load(starts_q + document), tl.load(starts_q + document + 1)
    key_start, key_stop = tl.load(starts_k + document), tl.load(starts_k + document + 1)
    return query_start, query_stop - query_start, key_start, key_stop - key_start
