"""The forward kernel: one program a (tile of queries, head), online softmax over the tiles of keys.

Keys are walked in up to four stretches: far to the left and far to the right, where the relative bias is one number and
costs nothing; near, where it is gathered by distance; and the ragged or masked end.
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
from fat5.ops.triton.numerics import LN2, dot, round_to


@triton.jit(do_not_specialize=[*SHAPE, "threshold"])
def forward_kernel(
    Q, K, V, Bias, KeyMask, Seed, Out, Lse, starts,
    q_strides, k_strides, v_strides, out_strides, lse_strides, bias_strides, mask_strides,
    heads, query_rows, key_rows, num_documents, tiles, reach, scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Out (as Q) and Lse (documents, heads, rows) fp32, natural logarithm, -inf where a query sees no key.

    `scale` carries log2(e); a weight is dropped where its random word is below `threshold`.
    """
    shape = (heads, query_rows, key_rows, num_documents, tiles, reach)
    head, slot = head_and_slot(tl.program_id(0), shape, PACKED)
    document, block, batch, query_start, query_length, key_start, key_length = locate(
        slot, starts, shape, PACKED, CAUSAL
    )
    if document < 0:
        return
    m0 = block * BLOCK_M
    bias = bias_of(Bias, bias_strides, reach, head, document)
    mask = mask_of(KeyMask, mask_strides, Seed, threshold, head, batch, document)
    place = (bias, mask, query_length, key_length, scale, keep_scale)
    keys = (rows_of(K, k_strides, batch, head, key_start), rows_of(V, v_strides, batch, head, key_start))
    queries = rows_of(Q, q_strides, batch, head, query_start)
    q = load_rows(queries, m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    normaliser = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    state = (acc, normaliser, maximum)

    near, far_right, whole, stop = key_stretches(m0, key_length, reach, BLOCK_M, BLOCK_N, BIAS, CAUSAL, HAS_KEY_MASK)
    if BIAS == RELATIVE:
        state = _attend(
            state, q, keys, place, m0, tl.load(bias[0] - reach) * scale, 0, near,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, NO_BIAS, False, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
        )  # fmt: skip
    state = _attend(
        state, q, keys, place, m0, 0.0, near, far_right,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BIAS, False, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
    )  # fmt: skip
    if BIAS == RELATIVE and not CAUSAL:
        state = _attend(
            state, q, keys, place, m0, tl.load(bias[0] + reach) * scale, far_right, whole,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, NO_BIAS, False, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
        )  # fmt: skip
    acc, normaliser, maximum = _attend(
        state, q, keys, place, m0, 0.0, whole, stop,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BIAS, True, CAUSAL, HAS_KEY_MASK, DROPOUT, PRECISION,
    )  # fmt: skip

    sees = normaliser > 0.0
    safe = tl.where(sees, normaliser, 1.0)
    rows = m0 + tl.arange(0, BLOCK_M)
    lse = tl.where(sees, (maximum + tl.log2(safe)) * LN2, float("-inf"))
    tl.store(at_document(Lse, lse_strides, batch, head, query_start) + rows, lse, mask=rows < query_length)
    acc = acc * tl.where(sees, keep_scale / safe, 0.0)[:, None]
    out = rows_of(Out, out_strides, batch, head, query_start)
    store_rows(out, acc, m0, query_length, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _attend(
    state, q, keys, place, m0, constant, first, stop,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys first..stop to the running softmax; `constant` is the bias of a far stretch."""
    acc, normaliser, maximum = state
    bias, mask, query_length, key_length, scale, keep_scale = place
    for n0 in range(first, stop, BLOCK_N):
        k = load_rows(keys[0], n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        scores = score_tile(q, k, place, m0, n0, BIAS, BLOCK_M, BLOCK_N, False, PRECISION)
        if MASKED:
            visible = visible_tile(mask, m0, n0, key_length, BLOCK_M, BLOCK_N, CAUSAL, HAS_KEY_MASK)
            scores = tl.where(visible, scores, float("-inf"))
        # scale > 0, so the largest score costs one multiplication a row, and the exponent below is one FMA.
        highest = tl.maximum(maximum, tl.max(scores, 1) * scale + constant)
        # A row that has seen nothing keeps -inf; subtracting 0 instead gives weights of 0, not NaN.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores * scale - (shift - constant)[:, None])
        correction = tl.exp2(maximum - shift)
        normaliser = normaliser * correction + tl.sum(weights, 1)
        maximum = highest
        if DROPOUT:
            weights = tl.where(kept_tile(mask, m0, n0, BLOCK_M, BLOCK_N, False), weights, 0.0)
        v = load_rows(keys[1], n0, key_length, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        if HAS_KEY_MASK and MASKED:
            # A padded value may hold anything, and 0 * NaN would spread it.
            v = tl.where(attended_keys(mask, n0, key_length, BLOCK_N)[:, None], v, 0.0)
        acc = dot(round_to(weights, v.dtype), v, acc * correction[:, None], PRECISION)
    return acc, normaliser, maximum
