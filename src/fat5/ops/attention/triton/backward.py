"""The backward kernels: dQ by tiles of queries, then dK and dV by tiles of keys. No atomics, so bit-equal every time.

Weights P = exp2(scores - lse), dP = dO V^T (dropout applied), delta = rowsum(dO * O), dS = P * (dP - delta). The dQ
pass runs first; it also leaves delta, and the sums of dS over the tiles that lie wholly beyond the reach of a relative
bias.
"""

import triton
import triton.language as tl

from fat5.ops.attention.triton.tiles import (
    NO_BIAS,
    RELATIVE,
    SHAPE,
    at_document,
    attended_keys,
    bias_of,
    head_and_slot,
    kept_tile,
    key_stretches,
    load_rows,
    locate,
    mask_of,
    rows_of,
    score_tile,
    store_rows,
    visible_tile,
)
from fat5.ops.triton.numerics import LOG2E, dot, round_to

# Where the sums of dS over a stretch go.
NOWHERE: tl.constexpr = tl.constexpr(0)
LEFT: tl.constexpr = tl.constexpr(1)
RIGHT: tl.constexpr = tl.constexpr(2)
BY_DISTANCE: tl.constexpr = tl.constexpr(3)


@triton.jit(do_not_specialize=[*SHAPE, "threshold"])
def query_gradient_kernel(
    Q, K, V, Bias, KeyMask, Seed, Out, GradOut, Lse, Exponent, Delta, GradQ, FarSums, starts,
    q_strides, k_strides, v_strides, out_strides, grad_out_strides, grad_q_strides, lse_strides, bias_strides,
    mask_strides, heads, query_rows, key_rows, num_documents, tiles, reach, scale, raw_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, FAR_SUMS: tl.constexpr,
):  # fmt: skip
    """GradQ; Exponent and Delta (as Lse) fp32; FarSums (programs, 2) fp32: dS summed over far-left and far-right tiles.

    Exponent is the log-sum-exp in base 2, +inf for a query that sees nothing, so that its weights come out as 0.
    A tile is far when all its distances saturate: n0 + BLOCK_N - 1 - m0 <= -R, or n0 - (m0 + BLOCK_M - 1) >= R. The
    band kernel leaves out exactly these tiles.
    """
    shape = (heads, query_rows, key_rows, num_documents, tiles, reach)
    program = tl.program_id(0)
    head, slot = head_and_slot(program, shape, PACKED)
    document, block, batch, query_start, query_length, key_start, key_length = locate(
        slot, starts, shape, PACKED, CAUSAL
    )
    if document < 0:
        if FAR_SUMS:
            tl.store(FarSums + 2 * program, 0.0)
            tl.store(FarSums + 2 * program + 1, 0.0)
        return
    m0 = block * BLOCK_M
    bias = bias_of(Bias, bias_strides, reach, head, document)
    mask = mask_of(KeyMask, mask_strides, Seed, threshold, head, batch, document)
    place = (bias, mask, query_length, key_length, scale, keep_scale)
    keys = (rows_of(K, k_strides, batch, head, key_start), rows_of(V, v_strides, batch, head, key_start))
    q = rows_of(Q, q_strides, batch, head, query_start)
    q = load_rows(q, m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    grad_out = rows_of(GradOut, grad_out_strides, batch, head, query_start)
    grad_out = load_rows(grad_out, m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    out = rows_of(Out, out_strides, batch, head, query_start)
    out = load_rows(out, m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    rows = m0 + tl.arange(0, BLOCK_M)
    inside = rows < query_length
    lse = tl.load(at_document(Lse, lse_strides, batch, head, query_start) + rows, mask=inside, other=float("-inf"))
    exponent = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(at_document(Exponent, lse_strides, batch, head, query_start) + rows, exponent, mask=inside)
    tl.store(at_document(Delta, lse_strides, batch, head, query_start) + rows, delta, mask=inside)
    queries = (q, grad_out, delta)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    left = tl.zeros([BLOCK_M], tl.float32)
    right = tl.zeros([BLOCK_M], tl.float32)
    sums = (dq, left, right)
    near, far_right, whole, stop = key_stretches(m0, key_length, reach, BLOCK_M, BLOCK_N, BIAS, CAUSAL, HAS_KEY_MASK)
    if BIAS == RELATIVE:
        sums = _pull(
            sums, queries, exponent - tl.load(bias[0] - reach) * scale, keys, place, m0, 0, near,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, NO_BIAS, False, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
            LEFT if FAR_SUMS else NOWHERE,
        )  # fmt: skip
    sums = _pull(
        sums, queries, exponent, keys, place, m0, near, far_right,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BIAS, False, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION, NOWHERE,
    )  # fmt: skip
    if BIAS == RELATIVE and not CAUSAL:
        sums = _pull(
            sums, queries, exponent - tl.load(bias[0] + reach) * scale, keys, place, m0, far_right, whole,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, NO_BIAS, False, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
            RIGHT if FAR_SUMS else NOWHERE,
        )  # fmt: skip
    dq, left, right = _pull(
        sums, queries, exponent, keys, place, m0, whole, stop,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BIAS, True, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
        BY_DISTANCE if FAR_SUMS else NOWHERE,
    )  # fmt: skip

    if FAR_SUMS:
        tl.store(FarSums + 2 * program, tl.sum(left, 0))
        tl.store(FarSums + 2 * program + 1, tl.sum(right, 0))
    grad_q = rows_of(GradQ, grad_q_strides, batch, head, query_start)
    store_rows(grad_q, dq * raw_scale, m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _pull(
    sums, queries, exponent, keys, place, m0, first, stop,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Adds what keys first..stop give to dQ; a far stretch's bias is already taken off `exponent`."""
    dq, left, right = sums
    q, grad_out, delta = queries
    bias, mask, query_length, key_length, scale, keep_scale = place
    for n0 in range(first, stop, BLOCK_N):
        k = load_rows(keys[0], n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        v = load_rows(keys[1], n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        if HAS_KEY_MASK and MASKED:
            attended = attended_keys(mask, n0, key_length, BLOCK_N)[:, None]
            k = tl.where(attended, k, 0.0)
            v = tl.where(attended, v, 0.0)
        scores = score_tile(q, k, place, m0, n0, BIAS, BLOCK_M, BLOCK_N, False, PRECISION)
        if MASKED:
            visible = visible_tile(mask, m0, n0, key_length, BLOCK_M, BLOCK_N, CAUSAL, HAS_KEY_MASK)
            scores = tl.where(visible, scores, float("-inf"))
        weights = tl.exp2(scores * scale - exponent[:, None])
        grad_weights = dot(grad_out, tl.trans(v), None, PRECISION)
        if DROPOUT:
            grad_weights = tl.where(kept_tile(mask, m0, n0, BLOCK_M, BLOCK_N, False), grad_weights * keep_scale, 0.0)
        grad_scores = weights * (grad_weights - delta[:, None])
        if SUMS == LEFT:
            left += tl.sum(grad_scores, 1)
        elif SUMS == RIGHT:
            right += tl.sum(grad_scores, 1)
        elif SUMS == BY_DISTANCE:
            total = tl.sum(grad_scores, 1)
            left += tl.where(n0 + BLOCK_N - 1 - m0 <= -bias[1], total, 0.0)
            right += tl.where(n0 - (m0 + BLOCK_M - 1) >= bias[1], total, 0.0)
        dq = dot(round_to(grad_scores, k.dtype), k, dq, PRECISION)
    return dq, left, right


@triton.jit(do_not_specialize=[*SHAPE, "threshold"])
def key_gradient_kernel(
    Q, K, V, Bias, KeyMask, Seed, GradOut, Exponent, Delta, GradK, GradV, starts,
    q_strides, k_strides, v_strides, grad_out_strides, grad_k_strides, grad_v_strides, lse_strides, bias_strides,
    mask_strides, heads, query_rows, key_rows, num_documents, tiles, reach, scale, raw_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """GradK and GradV; the work list lists tiles of keys. Scores are held transposed, (keys, queries).

    Rows of keys beyond the document are never stored, so only causality needs a mask; queries beyond it weigh nothing,
    because their exponent reads as +inf.
    """
    shape = (heads, query_rows, key_rows, num_documents, tiles, reach)
    head, slot = head_and_slot(tl.program_id(0), shape, PACKED)
    document, block, batch, query_start, query_length, key_start, key_length = locate(
        slot, starts, shape, PACKED, False, True
    )
    if document < 0:
        return
    n0 = block * BLOCK_N
    bias = bias_of(Bias, bias_strides, reach, head, document)
    mask = mask_of(KeyMask, mask_strides, Seed, threshold, head, batch, document)
    place = (bias, mask, query_length, key_length, scale, keep_scale)
    queries = (
        rows_of(Q, q_strides, batch, head, query_start),
        rows_of(GradOut, grad_out_strides, batch, head, query_start),
        at_document(Exponent, lse_strides, batch, head, query_start),
        at_document(Delta, lse_strides, batch, head, query_start),
    )
    k, v = rows_of(K, k_strides, batch, head, key_start), rows_of(V, v_strides, batch, head, key_start)
    k = load_rows(k, n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v, n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    keys = (k, v)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    stop = (query_length + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    first = 0
    if CAUSAL:
        first = n0 // BLOCK_M * BLOCK_M
        diagonal = tl.minimum(stop, (n0 + BLOCK_N + BLOCK_M - 2) // BLOCK_M * BLOCK_M)
        dk, dv = _push(
            dk, dv, keys, queries, place, n0, 0.0, first, diagonal,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BIAS, True, DROPOUT, PRECISION,
        )  # fmt: skip
        first = tl.maximum(first, diagonal)
    near = first
    far_left = stop
    if BIAS == RELATIVE:
        # The queries far below these keys see them on their far left; those far above, on their far right.
        if not CAUSAL:
            near = tl.minimum(stop, tl.maximum(n0 - reach + 1, 0) // BLOCK_M * BLOCK_M)
            dk, dv = _push(
                dk, dv, keys, queries, place, n0, tl.load(bias[0] + reach) * scale, first, near,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, NO_BIAS, False, DROPOUT, PRECISION,
            )  # fmt: skip
        far_left = tl.maximum(near, tl.minimum(stop, (n0 + BLOCK_N + reach + BLOCK_M - 2) // BLOCK_M * BLOCK_M))
    dk, dv = _push(
        dk, dv, keys, queries, place, n0, 0.0, near, far_left,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BIAS, False, DROPOUT, PRECISION,
    )  # fmt: skip
    if BIAS == RELATIVE:
        dk, dv = _push(
            dk, dv, keys, queries, place, n0, tl.load(bias[0] - reach) * scale, far_left, stop,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, NO_BIAS, False, DROPOUT, PRECISION,
        )  # fmt: skip

    dk = dk * raw_scale
    dv = dv * keep_scale
    if HAS_KEY_MASK:
        attended = attended_keys(mask, n0, key_length, BLOCK_N)[:, None]
        dk = tl.where(attended, dk, 0.0)
        dv = tl.where(attended, dv, 0.0)
    grad_k = rows_of(GradK, grad_k_strides, batch, head, key_start)
    store_rows(grad_k, dk, n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D)
    grad_v = rows_of(GradV, grad_v_strides, batch, head, key_start)
    store_rows(grad_v, dv, n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def _push(
    dk, dv, keys, queries, place, n0, constant, first, stop,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries first..stop give to dK and dV; `constant` is the bias of a far stretch."""
    k, v = keys
    bias, mask, query_length, key_length, scale, keep_scale = place
    for m0 in range(first, stop, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        q = load_rows(queries[0], m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        exponent = tl.load(queries[2] + rows, mask=rows < query_length, other=float("inf"))
        scores = score_tile(q, k, place, m0, n0, BIAS, BLOCK_M, BLOCK_N, True, PRECISION)
        if CAUSAL:
            columns = n0 + tl.arange(0, BLOCK_N)
            scores = tl.where(rows[None, :] >= columns[:, None], scores, float("-inf"))
        weights = tl.exp2(scores * scale - (exponent - constant)[None, :])
        grad_out = load_rows(queries[1], m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        delta = tl.load(queries[3] + rows, mask=rows < query_length, other=0.0)
        grad_weights = dot(v, tl.trans(grad_out), None, PRECISION)
        if DROPOUT:
            kept = kept_tile(mask, m0, n0, BLOCK_M, BLOCK_N, True)
            dv = dot(round_to(tl.where(kept, weights, 0.0), v.dtype), grad_out, dv, PRECISION)
            grad_weights = tl.where(kept, grad_weights * keep_scale, 0.0)
        else:
            dv = dot(round_to(weights, v.dtype), grad_out, dv, PRECISION)
        grad_scores = weights * (grad_weights - delta[None, :])
        dk = dot(round_to(grad_scores, k.dtype), q, dk, PRECISION)
    return dk, dv
