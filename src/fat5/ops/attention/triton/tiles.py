"""Device functions that every attention kernel shares: where a program's tile lies, its rows, its bias, its dropout.

Legend: M query rows of a tile, N keys of a tile, D head dimension (BLOCK_D: its next power of two). A *document* is a
packed document or, in the padded layout, a batch row. Scores are held as q k^T + bias / scale;
`scale` carries log2(e), so that scores * scale is an exponent of 2.
Arguments that belong together travel as tuples:

    strides   (batch, head, row, dimension) of q, k, v, out and their gradients; batch is 0 when packed
    starts    (work list, cu_seqlens_q, cu_seqlens_k), Nones in the padded layout
    shape     (heads, query rows, key rows, documents, tiles, R): rows are Lq and Lk, or all rows when packed
    bias      (a relative vector over scale, at distance 0, or a dense bias; R; the dense one's query and key strides)
    rows      (the first row of one head and document in q, k, v or a gradient; its row and dimension strides)
    mask      (key padding mask, its key stride, dropout seed, dropout threshold, head, document)
    place     (bias, mask, query length, key length, scale, keep scale): what all tiles of a head and document share

What a problem lacks (bias, mask, seed) is passed as some pointer that is never read.
"""

import triton
import triton.language as tl

from fat5.ops.triton.numerics import INTERPRETED, LOG2E, dot, round_to

# What a stretch of tiles adds to its scores.
NO_BIAS: tl.constexpr = tl.constexpr(0)  # nothing, or the one number of a far stretch of a relative bias
RELATIVE: tl.constexpr = tl.constexpr(1)
DENSE: tl.constexpr = tl.constexpr(2)
# The numbers of `shape`, which kernels take one by one: Triton specialises the elements of a tuple even when told not
# to, and would compile again for each length that is, or is not, a multiple of 16.
SHAPE = ("heads", "query_rows", "key_rows", "num_documents", "tiles", "reach")


@triton.jit(do_not_specialize=["total", "num_documents", "capacity"])
def work_list_kernel(
    Starts, Work, total, num_documents, capacity, BLOCK: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr
):
    """Writes Work[slot] = (document, block), the longest documents first; slots left over get (-1, 0).

    One program a document; document number `num_documents` stands for the rows after the last one, which belong to
    nobody and must still be written (zeros). A document's first slot is the number of tiles of all that go before it.
    """
    document = tl.program_id(0)
    tiles = _tiles_of(Starts, document, total, num_documents, BLOCK)
    first = 0
    everything = 0
    for chunk in range(0, num_documents + 1, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        others = _tiles_of(Starts, other, total, num_documents, BLOCK)
        goes_before = (others > tiles) | ((others == tiles) & (other < document))
        first += tl.sum(tl.where(goes_before, others, 0), 0)
        everything += tl.sum(others, 0)
    for chunk in range(0, tiles, CHUNK):
        block = chunk + tl.arange(0, CHUNK)
        slot = first + block
        listed = (block < tiles) & (slot < capacity)
        tl.store(Work + 2 * slot, tl.zeros_like(block) + document, mask=listed)
        tl.store(Work + 2 * slot + 1, tiles - 1 - block if REVERSE else block, mask=listed)
    for slot in range(everything + document, capacity, num_documents + 1):
        tl.store(Work + 2 * slot, -1)
        tl.store(Work + 2 * slot + 1, 0)


@triton.jit
def _tiles_of(Starts, document, total, num_documents, BLOCK: tl.constexpr):
    inside = document <= num_documents
    # Clamped, so that a broken cu_seqlens can give wrong results but never a wild address.
    start = tl.minimum(tl.maximum(tl.load(Starts + document, mask=inside, other=0), 0), total)
    stop = tl.minimum(tl.load(Starts + document + 1, mask=document < num_documents, other=total), total)
    return tl.where(inside, (tl.maximum(stop - start, 0) + BLOCK - 1) // BLOCK, 0)


@triton.jit
def head_and_slot(program, shape, PACKED: tl.constexpr):
    """Tiles of one document and head run side by side, so that they share its rows in the L2 cache."""
    heads, tiles = shape[0], shape[4]
    if PACKED:
        return program // tiles, program % tiles
    else:
        row = program // tiles
        return row % heads, row // heads * tiles + program % tiles


@triton.jit
def locate(slot, starts, shape, PACKED: tl.constexpr, LAST_FIRST: tl.constexpr, BY_KEYS: tl.constexpr = False):
    """The document of a work slot (-1: nothing to do), its block and batch row, then start and length of its queries
    and its keys.

    In the padded layout slots count the tiles of a batch row, then the batch rows. BY_KEYS says that the slots are
    tiles of keys: the rows after the last document are then listed as keys without queries, otherwise as queries
    without keys.
    """
    work, starts_q, starts_k = starts
    heads, query_rows, key_rows, num_documents, tiles, R = shape
    if PACKED:
        document = tl.load(work + 2 * slot)
        block = tl.load(work + 2 * slot + 1, mask=document >= 0, other=0)
        known = tl.maximum(document, 0)
        query_start, query_stop = _boundaries(starts_q, known, num_documents, query_rows)
        key_start, key_stop = _boundaries(starts_k, known, num_documents, key_rows)
        if BY_KEYS:
            query_stop = tl.where(known < num_documents, query_stop, query_start)
        else:
            key_stop = tl.where(known < num_documents, key_stop, key_start)
        return document, block, 0, query_start, query_stop - query_start, key_start, key_stop - key_start
    else:
        block = slot % tiles
        # When causal, the last rows see the most keys: start with them.
        return slot // tiles, tiles - 1 - block if LAST_FIRST else block, slot // tiles, 0, query_rows, 0, key_rows


@triton.jit
def _boundaries(Starts, document, num_documents, total):
    start = tl.minimum(tl.maximum(tl.load(Starts + document), 0), total)
    stop = tl.minimum(tl.load(Starts + document + 1, mask=document < num_documents, other=total), total)
    return start, tl.maximum(start, stop)


@triton.jit
def at_document(Base, strides, batch, head, start):
    """The pointer moved to row `start` of a batch row and head, in 64 bits."""
    return (
        Base
        + tl.cast(batch, tl.int64) * strides[0]
        + tl.cast(head, tl.int64) * strides[1]
        + tl.cast(start, tl.int64) * strides[2]
    )


@triton.jit
def rows_of(Base, strides, batch, head, start):
    """The `rows` tuple of one head and document."""
    return at_document(Base, strides, batch, head, start), strides[2], strides[3]


@triton.jit
def key_stretches(
    m0, key_length, R, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """(near, far_right, whole, stop), multiples of BLOCK_N but the last: where the stretches of keys that a tile of
    queries sees end.

    Keys before `near` lie far to the left, those from `far_right` to `whole` far to the right; keys from `whole` to
    `stop` lie in tiles that need a mask.
    """
    stop = tl.minimum(key_length, m0 + BLOCK_M) if CAUSAL else key_length
    whole = (tl.minimum(key_length, m0 + 1) if CAUSAL else key_length) // BLOCK_N * BLOCK_N
    if HAS_KEY_MASK:
        whole = 0
    near = 0
    far_right = whole
    if BIAS == RELATIVE:
        near = tl.minimum(whole, tl.maximum(m0 - R + 1, 0) // BLOCK_N * BLOCK_N)
        if not CAUSAL:
            far_right = tl.maximum(near, tl.minimum(whole, (m0 + BLOCK_M + R + BLOCK_N - 2) // BLOCK_N * BLOCK_N))
    return near, far_right, whole, stop


@triton.jit
def bias_of(Bias, strides, R, head, document):
    """The `bias` tuple of one head and document."""
    start = Bias + tl.cast(document, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    return start, R, strides[2], strides[3]


@triton.jit
def mask_of(KeyMask, mask_strides, Seed, threshold, head, batch, document):
    """The `mask` tuple of one head and document."""
    return KeyMask + tl.cast(batch, tl.int64) * mask_strides[0], mask_strides[1], Seed, threshold, head, document


@triton.jit
def load_rows(
    source, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """(ROWS, BLOCK_D): rows first..first+ROWS of a document; zeros beyond `length` (if MASKED) and beyond HEAD_DIM."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    pointers = _pointers(source, first, rows, dims)
    if MASKED:
        if BLOCK_D == HEAD_DIM:
            return tl.load(pointers, mask=(first + rows)[:, None] < length, other=0.0)
        else:
            return tl.load(pointers, mask=((first + rows)[:, None] < length) & (dims < HEAD_DIM)[None, :], other=0.0)
    else:
        if BLOCK_D == HEAD_DIM:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(target, tile, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of a masked `load_rows`; rounds to the element type of `target`."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    mask = ((first + rows)[:, None] < length) & (dims < HEAD_DIM)[None, :]
    tl.store(_pointers(target, first, rows, dims), round_to(tile, target[0].dtype.element_ty), mask=mask)


@triton.jit
def _pointers(base, first, rows, dims):
    # The first row's offset is added to the pointer in 64 bits; 32 are enough inside a tile.
    start, row_stride, stride = base
    return start + tl.cast(first, tl.int64) * row_stride + (rows[:, None] * row_stride + dims[None, :] * stride)


@triton.jit
def relative_tile(bias, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(M, N), or (N, M) when TRANSPOSED, fp32: the relative bias over scale, for the accumulator of q k^T to start
    from.

    The vector is padded with its end values by BLOCK_M + BLOCK_N on either side, so that only a scalar is clamped and
    each element's address is one register plus a constant.
    """
    queries = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    start = bias[0] + tl.minimum(tl.maximum(n0 - m0, -bias[1] - BLOCK_N), bias[1] + BLOCK_M)
    if TRANSPOSED:
        pointers = (start - queries.to(tl.int64))[None, :] + keys.to(tl.int64)[:, None]
    else:
        pointers = (start - queries.to(tl.int64))[:, None] + keys.to(tl.int64)[None, :]
    if INTERPRETED:
        return tl.load(pointers)
    else:
        # A tl.load would be staged through shared memory as if it were an operand; as an elementwise instruction it is
        # done where the accumulator lives, a handful of neighbouring addresses a warp, all in the L1 cache.
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def dense_tile(
    bias, m0, n0, query_length, key_length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """(M, N), or (N, M) when TRANSPOSED, fp32: a dense bias; 0 outside the document."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    # The tile's corner in 64 bits; inside it 32 are enough, and half the registers.
    corner = bias[0] + tl.cast(m0, tl.int64) * bias[2] + tl.cast(n0, tl.int64) * bias[3]
    if TRANSPOSED:
        inside = (n0 + columns < key_length)[:, None] & (m0 + rows < query_length)[None, :]
        at = columns[:, None] * bias[3] + rows[None, :] * bias[2]
    else:
        inside = (m0 + rows < query_length)[:, None] & (n0 + columns < key_length)[None, :]
        at = rows[:, None] * bias[2] + columns[None, :] * bias[3]
    return tl.load(corner + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def score_tile(
    q, k, place, m0, n0, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(M, N), or (N, M) when TRANSPOSED: q k^T + bias / scale; times scale they are base-2 scores."""
    bias, mask, query_length, key_length, scale, keep_scale = place
    if BIAS == RELATIVE:
        start = relative_tile(bias, m0, n0, BLOCK_M, BLOCK_N, TRANSPOSED)
    else:
        start = None
    if TRANSPOSED:
        scores = dot(k, tl.trans(q), start, PRECISION)
    else:
        scores = dot(q, tl.trans(k), start, PRECISION)
    if BIAS == DENSE:
        scores += dense_tile(bias, m0, n0, query_length, key_length, BLOCK_M, BLOCK_N, TRANSPOSED) * (LOG2E / scale)
    return scores


@triton.jit
def visible_tile(
    mask, m0, n0, key_length,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """(M, N), or (1, N) where rows do not matter: which keys a query may see."""
    keys = n0 + tl.arange(0, BLOCK_N)
    visible = (keys < key_length)[None, :]
    if HAS_KEY_MASK:
        visible = attended_keys(mask, n0, key_length, BLOCK_N)[None, :]
    if CAUSAL:
        queries = m0 + tl.arange(0, BLOCK_M)
        visible = visible & (queries[:, None] >= keys[None, :])
    return visible


@triton.jit
def attended_keys(mask, n0, key_length, BLOCK_N: tl.constexpr):
    """(N,) bool: the key padding mask, False beyond the document."""
    keys = n0 + tl.arange(0, BLOCK_N)
    return tl.load(mask[0] + keys * mask[1], mask=keys < key_length, other=0) != 0


@triton.jit
def kept_tile(mask, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(M, N), or (N, M) bool: the weights that dropout keeps; fat5.ops.attention.dropout specifies them."""
    key_mask, key_stride, seed, threshold, head, document = mask
    queries = m0 + tl.arange(0, BLOCK_M)
    keys = n0 + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        zero = keys[:, None] * 0 + queries[None, :] * 0
        column, row = keys[:, None] + zero, queries[None, :] + zero
    else:
        zero = queries[:, None] * 0 + keys[None, :] * 0
        column, row = keys[None, :] + zero, queries[:, None] + zero
    word, _, _, _ = tl.philox(tl.load(seed), column, row, zero + head, zero + document)
    return word.to(tl.uint32) >= tl.cast(threshold, tl.uint32)
