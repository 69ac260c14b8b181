"""Attention of one head of one document on the CPU, compiled by numba: products, softmax, dropout and every gradient.

`_forward` and `_backward` take blocks of queries against keys that stay in the core's own cache. No matrix of size
Lq x Lk exists, and the gradient of the bias reads dS as it is made. Products are computed a block of registers at a
time (`_tile`, written in LLVM IR for this processor's vectors): PyTorch's fused CPU kernel and batched products call
MKL, which uses half of an AMD processor's vector units.

All jitted functions live in this file, because numba's cache notices changes of a function's own file only. Pointers
are int64 addresses of float32; lengths, strides and offsets are counted in elements.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_FEATURES = llvmlite.binding.get_host_cpu_features()
# A block of registers is ROWS rows of VECTORS vectors of WIDTH float32; blocks of FEW_ROWS rows finish a matrix. The
# block, one row of vectors and one broadcast number fill the 32 registers of AVX-512 and Arm, or the 16 of AVX2.
if _FEATURES.get("avx512f"):
    WIDTH, ROWS, VECTORS, FEW_ROWS = 16, 12, 2, 4
elif _FEATURES.get("avx2"):
    WIDTH, ROWS, VECTORS, FEW_ROWS = 8, 6, 2, 2
else:
    WIDTH, ROWS, VECTORS, FEW_ROWS = 4, 6, 4, 2
COLUMNS = WIDTH * VECTORS

BLOCK_ROWS = 48  # rows of queries at a time
BLOCK_KEYS = 512  # keys at a time in backward: with 48 rows and 64 dimensions, 850 kB
BLOCK_SCORES = 1 << 17  # scores at a time in forward, which wants whole rows: 512 kB
CHUNK_ROWS = 512  # rows of one forward task
PAD = 16  # keeps rows of scores from falling into one cache set
LANES = 64  # partial sums of a reduction, added in halves
ROUNDS = 1.5 * 2**23
SEEN_NOTHING = np.float32(-1e30)  # what a score becomes where the key is hidden

CALL = np.dtype(
    [(name, np.int64) for name in (
        "items", "bounds", "tickets", "next", "entered", "scratch", "scratch_size", "backward",
        "q", "k", "v", "out", "lse", "grad_out", "grad_q", "grad_k", "grad_v",
        "q_row", "k_row", "v_row", "out_row", "grad_out_row", "grad_k_row", "lse_row",
        "width", "causal", "bias", "grad_bias", "dense", "dense_row", "dense_column", "grad_dense",
        "grad_dense_row", "grad_dense_column", "visible", "seed", "threshold",
    )]
    + [("scale", np.float32), ("keep_scale", np.float32)],
    align=True,
)  # fmt: skip
"""One call: addresses of tensors (0 where there is none), token strides, settings. Records, for the kernels."""

ITEM = np.dtype(
    [(name, np.int64) for name in (
        "document", "head", "first", "last", "length_q", "length_k", "key_start",
        "q", "k", "v", "out", "grad_out", "grad_k", "lse", "bias", "grad_bias", "dense", "grad_dense", "visible",
    )],
    align=True,
)  # fmt: skip
"""One head of one document: its rows, lengths, and where it begins in each tensor."""


def jit(function: Callable[..., Any]) -> Any:
    """`numba.njit`, cached on disk where a folder can be written.

    Without fastmath: with it, code from the cache and code just compiled differ in the last place of a sum, and so does
    a run from the one that continues it. Sums in lanes (`_sum`, `_dot`) become vectors all the same.
    """
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # "no locator available": read-only installation and home
        return numba.njit(nogil=True, error_model="numpy")(function)


def worker() -> Any:
    """The compiled `_work`, to be called by each thread with the address of a CALL record."""
    signature = types.void(types.CPointer(numba.from_dtype(CALL)))
    try:
        return numba.cfunc(signature, cache=True)(_work)
    except RuntimeError:
        return numba.cfunc(signature)(_work)


def _tile(rows: int, adds: bool) -> Any:
    """c (rows, COLUMNS) = or += a (rows, k) b (k, COLUMNS); every sum stays in a register.

    The old c is added last, so that a sum over many blocks loses no more to rounding than one block's.

    Arguments: a, its strides by row and by k; b, its stride by k; c, its stride by row; k.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        a, a_row, a_k, b, b_k, c, c_row, k = arguments
        integer, number = ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(number, WIDTH)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{WIDTH}f32"
        )

        def constant(value: int) -> Any:
            return ir.Constant(integer, value)

        def place(pointer, *offsets):  # type: ignore[no-untyped-def]
            for offset in offsets:
                pointer = builder.gep(pointer, [offset])
            return builder.bitcast(pointer, vector.as_pointer())

        start_a, start_b, start_c = (builder.inttoptr(x, number.as_pointer()) for x in (a, b, c))
        block = [(i, j) for i in range(rows) for j in range(VECTORS)]
        row_offsets = [builder.mul(a_row, constant(i)) for i in range(rows)]
        places = [place(start_c, builder.mul(c_row, constant(i)), constant(j * WIDTH)) for i, j in block]
        zero = ir.Constant(vector, [0.0] * WIDTH)

        before, loop, after = builder.block, builder.append_basic_block("k"), builder.append_basic_block("end")
        builder.branch(loop)
        builder.position_at_end(loop)
        step, at_a, at_b = (builder.phi(kind) for kind in (integer, number.as_pointer(), number.as_pointer()))
        running = [builder.phi(vector) for _ in block]
        column = [builder.load(place(at_b, constant(j * WIDTH)), align=4) for j in range(VECTORS)]
        after_step = []
        for i in range(rows):
            one = builder.load(builder.gep(at_a, [row_offsets[i]]))
            lane = builder.insert_element(ir.Constant(vector, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
            spread = builder.shuffle_vector(lane, ir.Constant(vector, ir.Undefined), lanes)
            after_step += [builder.call(fma, [spread, column[j], running[i * VECTORS + j]]) for j in range(VECTORS)]
        next_values = [builder.add(step, constant(1)), builder.gep(at_a, [a_k]), builder.gep(at_b, [b_k]), *after_step]
        firsts = [constant(0), start_a, start_b, *(zero for _ in block)]
        for phi, first, following in zip([step, at_a, at_b, *running], firsts, next_values):
            phi.add_incoming(first, before)
            phi.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", next_values[0], k), loop, after)
        builder.position_at_end(after)
        for at, value in zip(places, after_step):
            builder.store(builder.fadd(builder.load(at, align=4), value) if adds else value, at, align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(_context, a, a_row, a_k, b, b_k, c, c_row, k):  # type: ignore[no-untyped-def]
        return types.void(*(types.int64,) * 8), generate

    return tile


_tile_set, _tile_add = _tile(ROWS, False), _tile(ROWS, True)
_tile_set_few, _tile_add_few = _tile(FEW_ROWS, False), _tile(FEW_ROWS, True)


@intrinsic
def _exp(_context, x):  # type: ignore[no-untyped-def]
    """exp(x) of a float32 below 88, 0 below -87: 2^n times a polynomial of degree 6 (the coefficients of Cephes)."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        number, integer = ir.FloatType(), ir.IntType(32)
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [number] * 3), "llvm.fma.f32")

        def constant(value: float) -> Any:
            return ir.Constant(number, float(np.float32(value)))

        small = builder.fcmp_ordered("<", arguments[0], constant(-87.0))
        x = builder.select(small, constant(-87.0), arguments[0])
        # Added to 1.5 * 2^23, a number is rounded to an integer, in the lowest bits.
        shifted = builder.call(fma, [x, constant(1.4426950408889634), constant(ROUNDS)])
        power = builder.fsub(shifted, constant(ROUNDS))
        r = builder.call(fma, [power, constant(-0.693359375), x])
        r = builder.call(fma, [power, constant(2.12194440e-4), r])
        value = constant(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1, 1):
            value = builder.call(fma, [value, r, constant(coefficient)])
        exponent = builder.shl(builder.bitcast(shifted, integer), ir.Constant(integer, 23))
        value = builder.bitcast(builder.add(builder.bitcast(value, integer), exponent), number)
        return builder.select(small, constant(0.0), value)

    return types.float32(types.float32), generate


@intrinsic
def _larger(_context, x, y):  # type: ignore[no-untyped-def]
    """The larger of two float32, unspecified where one is NaN, so that a loop over it vectorises."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", *arguments, flags=flags), *arguments, flags=flags)

    return types.float32(types.float32, types.float32), generate


def _pointer(kind: Any) -> Any:
    """A function from an int64 address to a pointer to numba's type `kind`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    @intrinsic
    def pointer(_context, address):  # type: ignore[no-untyped-def]
        return types.CPointer(kind)(types.int64), generate

    return pointer


_floats, _bytes, _integers = _pointer(types.float32), _pointer(types.uint8), _pointer(types.int64)
_items = _pointer(numba.from_dtype(ITEM))


@intrinsic
def _take(_context, address):  # type: ignore[no-untyped-def]
    """Adds one to the int64 at an address, atomically, and returns its old value."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        integer = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], integer.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(integer, 1), "monotonic")

    return types.int64(types.int64), generate


@jit
def _at(address, offset):  # type: ignore[no-untyped-def]
    return address + 4 * offset


@jit
def _up(value, multiple):  # type: ignore[no-untyped-def]
    return (value + multiple - 1) // multiple * multiple


@jit
def _product(a, a_row, a_k, b, b_k, b_panel, c, c_row, m, n, k, adds):  # type: ignore[no-untyped-def]
    """c (m, n) = or += a (m, k) b (k, n); b lies in panels of COLUMNS columns. m and n count whole small tiles."""
    for panel in range(n // COLUMNS):
        panel_b, panel_c = _at(b, panel * b_panel), _at(c, panel * COLUMNS)
        i = 0
        while i < m:
            tile_a, tile_c = _at(a, i * a_row), _at(panel_c, i * c_row)
            if i + ROWS <= m:
                if adds:
                    _tile_add(tile_a, a_row, a_k, panel_b, b_k, tile_c, c_row, k)
                else:
                    _tile_set(tile_a, a_row, a_k, panel_b, b_k, tile_c, c_row, k)
                i += ROWS
            else:
                if adds:
                    _tile_add_few(tile_a, a_row, a_k, panel_b, b_k, tile_c, c_row, k)
                else:
                    _tile_set_few(tile_a, a_row, a_k, panel_b, b_k, tile_c, c_row, k)
                i += FEW_ROWS


@jit
def _pack(target, width, rows, source, source_row, count, columns, factor):  # type: ignore[no-untyped-def]
    """target (rows, width) = factor * source (count, columns), zeros around it."""
    for i in range(count):
        to, come = numba.carray(_floats(_at(target, i * width)), width), _floats(_at(source, i * source_row))
        origin = numba.carray(come, columns)
        for j in range(columns):
            to[j] = factor * origin[j]
        for j in range(columns, width):
            to[j] = 0.0
    _clear(_at(target, count * width), (rows - count) * width)


@jit
def _pack_panels(target, rows, source, source_row, count, columns):  # type: ignore[no-untyped-def]
    """The transpose of source (count, columns) in panels of COLUMNS of its rows; zeros for rows beyond `count`."""
    for i in range(rows):
        panel = numba.carray(_floats(_at(target, i // COLUMNS * COLUMNS * columns + i % COLUMNS)), COLUMNS * columns)
        if i < count:
            origin = numba.carray(_floats(_at(source, i * source_row)), columns)
            for j in range(columns):
                panel[j * COLUMNS] = origin[j]
        else:
            for j in range(columns):
                panel[j * COLUMNS] = 0.0


@jit
def _clear(x, count):  # type: ignore[no-untyped-def]
    a = numba.carray(_floats(x), count)
    for j in range(count):
        a[j] = 0.0


@jit
def _add_scaled(x, y, factor, count):  # type: ignore[no-untyped-def]
    """x += factor * y."""
    a, b = numba.carray(_floats(x), count), numba.carray(_floats(y), count)
    for j in range(count):
        a[j] += factor * b[j]


@jit
def _set_scaled(x, y, factor, count):  # type: ignore[no-untyped-def]
    a, b = numba.carray(_floats(x), count), numba.carray(_floats(y), count)
    for j in range(count):
        a[j] = factor * b[j]


@jit
def _multiply(x, y, z, count):  # type: ignore[no-untyped-def]
    """x = y * z."""
    a, b, c = (numba.carray(_floats(x), count), numba.carray(_floats(y), count), numba.carray(_floats(z), count))
    for j in range(count):
        a[j] = b[j] * c[j]


@jit
def _sum(x, count, lanes):  # type: ignore[no-untyped-def]
    """The sum of x, element j in lane j % LANES; `lanes` is scratch memory."""
    a, s = numba.carray(_floats(x), count), numba.carray(_floats(lanes), LANES)
    whole = count // LANES * LANES
    _clear(lanes, LANES)
    for start in range(0, whole, LANES):
        for j in range(LANES):
            s[j] += a[start + j]
    for j in range(count - whole):
        s[j] += a[whole + j]
    return _folded(lanes)


@jit
def _dot(x, y, count, lanes):  # type: ignore[no-untyped-def]
    """The sum of x * y, in the same order."""
    a, b, s = (numba.carray(_floats(x), count), numba.carray(_floats(y), count), numba.carray(_floats(lanes), LANES))
    whole = count // LANES * LANES
    _clear(lanes, LANES)
    for start in range(0, whole, LANES):
        for j in range(LANES):
            s[j] += a[start + j] * b[start + j]
    for j in range(count - whole):
        s[j] += a[whole + j] * b[whole + j]
    return _folded(lanes)


@jit
def _folded(lanes):  # type: ignore[no-untyped-def]
    s = numba.carray(_floats(lanes), LANES)
    half = LANES // 2
    while half:
        for j in range(half):
            s[j] += s[half + j]
        half //= 2
    return s[0]


@jit
def _largest(x, count):  # type: ignore[no-untyped-def]
    a = numba.carray(_floats(x), count)
    largest = np.float32(SEEN_NOTHING)
    for j in range(count):
        largest = _larger(a[j], largest)
    return largest


@jit
def _exponentials(x, largest, count):  # type: ignore[no-untyped-def]
    """x = exp(x - largest)."""
    a = numba.carray(_floats(x), count)
    for j in range(count):
        a[j] = _exp(a[j] - largest)


@jit
def _hidden(largest, total):  # type: ignore[no-untyped-def]
    """Whether no key of a row can be seen; a row of NaN may have no largest score, but its sum is NaN."""
    return largest <= SEEN_NOTHING and total == total


@jit
def _score_gradients(p, grad, delta, count):  # type: ignore[no-untyped-def]
    """grad = p * (grad - delta): dS from dP."""
    a, b = numba.carray(_floats(p), count), numba.carray(_floats(grad), count)
    for j in range(count):
        b[j] = a[j] * (b[j] - delta)


@jit
def _keep(target, seed, threshold, scale, document, head, row, first, count):  # type: ignore[no-untyped-def]
    """0 or `scale` for each key of a row, by the Philox4x32-10 of dropout.py."""
    kept = numba.carray(_floats(target), count)
    mask = 0xFFFFFFFF
    for j in range(count):
        c0, c1, c2, c3 = first + j, row, head, document
        k0, k1 = seed & mask, (seed >> 32) & mask
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
            c0, c1, c2, c3 = (((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask)
            k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
        kept[j] = scale if c0 >= threshold else np.float32(0.0)


@jit
def _seen(call, item, row):  # type: ignore[no-untyped-def]
    """How many keys a row may see."""
    if call.causal == 0:
        return item.length_k
    return min(max(row + 1 - item.key_start, 0), item.length_k)


@jit
def _add_masks(call, item, scores, row, first, count):  # type: ignore[no-untyped-def]
    """Adds the bias to a row's scores of keys first..first+count, and hides the keys that are masked."""
    if call.bias != 0:
        _add_scaled(scores, _at(call.bias, item.bias + first - row), np.float32(1.0), count)
    a = numba.carray(_floats(scores), count)
    if call.dense != 0:
        dense = _floats(_at(call.dense, item.dense + row * call.dense_row + first * call.dense_column))
        for j in range(count):
            a[j] = max(a[j] + dense[j * call.dense_column], SEEN_NOTHING)
    if call.visible != 0:
        visible = numba.carray(_bytes(call.visible + item.visible + first), count)
        for j in range(count):
            a[j] = a[j] if visible[j] != 0 else SEEN_NOTHING


@jit
def forward_scratch(width, length_k):  # type: ignore[no-untyped-def]
    """Elements of scratch memory that `_forward` needs for at most `length_k` keys."""
    padded, keys = _up(width, COLUMNS), _up(length_k, COLUMNS)
    # With fewer keys a block has more rows, and may hold more scores.
    most = min(BLOCK_SCORES + BLOCK_ROWS * PAD, BLOCK_ROWS * (keys + PAD))
    scores = max(_block_rows(keys) * (keys + PAD), most)
    return keys * (width + padded + 1) + BLOCK_ROWS * (2 * padded + 1) + scores + LANES


@jit
def _block_rows(keys):  # type: ignore[no-untyped-def]
    return min(max(BLOCK_SCORES // max(keys, 1) // ROWS * ROWS, ROWS), BLOCK_ROWS)


@jit
def _forward(call, item, scratch):  # type: ignore[no-untyped-def]
    width, padded, keys = call.width, _up(call.width, COLUMNS), _up(item.length_k, COLUMNS)
    stride, block = keys + PAD, _block_rows(keys)
    key_panels = scratch
    values = _at(key_panels, keys * width)
    query = _at(values, keys * padded)
    result = _at(query, BLOCK_ROWS * padded)
    scores = _at(result, BLOCK_ROWS * padded)
    sums = numba.carray(_floats(_at(scores, block * stride)), BLOCK_ROWS)
    kept = _at(scores, block * stride + BLOCK_ROWS)
    lanes = _at(kept, keys)
    _pack_panels(key_panels, keys, _at(call.k, item.k), call.k_row, item.length_k, width)
    _pack(values, padded, keys, _at(call.v, item.v), call.v_row, item.length_k, width, np.float32(1.0))
    lse = _floats(_at(call.lse, item.lse))
    for first in range(item.first, item.last, block):
        count = min(block, item.last - first)
        rows = _up(count, FEW_ROWS)
        seen = _seen(call, item, first + count - 1)
        if seen > 0:
            _pack(query, width, rows, _at(call.q, item.q + first * call.q_row), call.q_row, count, width, call.scale)
            _product(
                query, width, 1, key_panels, COLUMNS, COLUMNS * width, scores, stride, rows, _up(seen, COLUMNS), width,
                False,
            )  # fmt: skip
        for i in range(count):
            row = first + i
            own = _seen(call, item, row)
            line = _at(scores, i * stride)
            largest, total = SEEN_NOTHING, np.float32(0.0)
            if own > 0:
                _add_masks(call, item, line, row, 0, own)
                largest = _largest(line, own)
                _exponentials(line, largest, own)
                total = _sum(line, own, lanes)
            blind = own == 0 or _hidden(largest, total)
            lse[row * call.lse_row] = -np.inf if blind else largest + np.log(total)
            sums[i] = np.float32(1.0) if blind else total
            if blind:
                _clear(line, seen)
            else:
                _clear(_at(line, own), seen - own)
                if call.seed != 0:
                    seed = _integers(call.seed)[0]
                    _keep(
                        kept, seed, call.threshold, call.keep_scale, item.document, item.head, row, item.key_start, own
                    )
                    _multiply(line, line, kept, own)
        for c0 in range(0, seen, BLOCK_KEYS):
            _product(
                _at(scores, c0), stride, 1, _at(values, c0 * padded), padded, COLUMNS, result, padded, rows, padded,
                min(BLOCK_KEYS, seen - c0), c0 > 0,
            )  # fmt: skip
        for i in range(count):
            target = _at(call.out, item.out + (first + i) * call.out_row)
            if seen > 0:
                _set_scaled(target, _at(result, i * padded), np.float32(1.0) / sums[i], width)
            else:
                _clear(target, width)


@jit
def backward_scratch(width, length_k):  # type: ignore[no-untyped-def]
    """Elements of scratch memory that `_backward` needs for at most `length_k` keys."""
    padded, keys = _up(width, COLUMNS), _up(min(length_k, BLOCK_KEYS), COLUMNS)
    rows = 3 * BLOCK_ROWS * (padded + keys + PAD)
    return 2 * keys * width + 3 * keys * padded + rows + keys + LANES


@jit
def _backward(call, item, scratch):  # type: ignore[no-untyped-def]
    width, padded, most = call.width, _up(call.width, COLUMNS), _up(min(item.length_k, BLOCK_KEYS), COLUMNS)
    stride = most + PAD
    key_panels = scratch
    value_panels = _at(key_panels, most * width)
    key = _at(value_panels, most * width)
    grad_key, grad_value = _at(key, most * padded), _at(key, 2 * most * padded)
    query = _at(grad_value, most * padded)
    grad_result, grad_query = _at(query, BLOCK_ROWS * padded), _at(query, 2 * BLOCK_ROWS * padded)
    weights = _at(grad_query, BLOCK_ROWS * padded)
    grads = _at(weights, BLOCK_ROWS * stride)
    # With dropout the weights that meet the values are not those of the softmax.
    dropped = _at(grads, BLOCK_ROWS * stride) if call.seed != 0 else weights
    kept = _at(grads, 2 * BLOCK_ROWS * stride)
    lanes = _at(kept, most)
    one = np.float32(1.0)
    whole = item.length_k <= BLOCK_KEYS
    for c0 in range(0, item.length_k, BLOCK_KEYS):
        columns = min(BLOCK_KEYS, item.length_k - c0)
        from_k, from_v = _at(call.k, item.k + c0 * call.k_row), _at(call.v, item.v + c0 * call.v_row)
        _pack_panels(key_panels, _up(columns, COLUMNS), from_k, call.k_row, columns, width)
        _pack_panels(value_panels, _up(columns, COLUMNS), from_v, call.v_row, columns, width)
        _pack(key, padded, columns, from_k, call.k_row, columns, width, one)
        _clear(grad_key, most * padded)
        _clear(grad_value, most * padded)
        for first in range(0, item.length_q, BLOCK_ROWS):
            count = min(BLOCK_ROWS, item.length_q - first)
            rows = _up(count, FEW_ROWS)
            seen = min(_seen(call, item, first + count - 1) - c0, columns)
            if seen <= 0:
                continue
            seen_padded = _up(seen, COLUMNS)
            _pack(query, padded, rows, _at(call.q, item.q + first * call.q_row), call.q_row, count, width, call.scale)
            upstream = _at(call.grad_out, item.grad_out + first * call.grad_out_row)
            _pack(grad_result, padded, rows, upstream, call.grad_out_row, count, width, one)
            _product(
                query, padded, 1, key_panels, COLUMNS, COLUMNS * width, weights, stride, rows, seen_padded, width, False
            )
            _product(
                grad_result, padded, 1, value_panels, COLUMNS, COLUMNS * width, grads, stride, rows, seen_padded,
                width, False,
            )  # fmt: skip
            for i in range(rows):
                own = min(max(_seen(call, item, first + i) - c0, 0), columns) if i < count else 0
                if own > 0:
                    _backward_row(
                        call, item, first + i, c0, own, whole, _at(weights, i * stride), _at(grads, i * stride),
                        _at(dropped, i * stride), kept, _at(grad_result, i * padded), lanes,
                    )  # fmt: skip
                _clear(_at(weights, i * stride + own), seen_padded - own)
                _clear(_at(grads, i * stride + own), seen_padded - own)
                if call.seed != 0:
                    _clear(_at(dropped, i * stride + own), seen_padded - own)
            keys = _up(seen, FEW_ROWS)
            _product(dropped, 1, stride, grad_result, padded, COLUMNS, grad_value, padded, keys, padded, count, True)
            _product(grads, 1, stride, query, padded, COLUMNS, grad_key, padded, keys, padded, count, True)
            _product(grads, stride, 1, key, padded, COLUMNS, grad_query, padded, rows, padded, seen, False)
            for i in range(count):
                _add_scaled(
                    _at(call.grad_q, item.out + (first + i) * call.out_row), _at(grad_query, i * padded), call.scale,
                    width,
                )  # fmt: skip
        for j in range(columns):
            offset = item.grad_k + (c0 + j) * call.grad_k_row
            _set_scaled(_at(call.grad_k, offset), _at(grad_key, j * padded), one, width)
            _set_scaled(_at(call.grad_v, offset), _at(grad_value, j * padded), one, width)


@jit
def _backward_row(call, item, row, c0, own, whole, weights, grads, dropped, kept, grad_result, lanes):  # type: ignore[no-untyped-def]
    """Turns a row's scores and dP into its weights, its dropped weights and dS; adds dS to the bias's gradient.

    A `whole` row is normalised by its own sum, and its delta is rowsum(P dP), so that its dS sums to zero up to
    rounding; a part of a row uses the log-sum-exp and the output of the forward pass.
    """
    _add_masks(call, item, weights, row, c0, own)
    if whole:
        largest = _largest(weights, own)
        _exponentials(weights, largest, own)
        total = _sum(weights, own, lanes)
        blind = _hidden(largest, total)
        if not blind:
            _set_scaled(weights, weights, np.float32(1.0) / total, own)
    else:
        largest = _floats(_at(call.lse, item.lse))[row * call.lse_row]
        blind = largest == -np.inf
        if not blind:
            _exponentials(weights, largest, own)
    if blind:
        _clear(weights, own)
    if call.seed != 0:
        seed = _integers(call.seed)[0]
        first = item.key_start + c0
        _keep(kept, seed, call.threshold, call.keep_scale, item.document, item.head, row, first, own)
        _multiply(dropped, weights, kept, own)
        _multiply(grads, grads, kept, own)
    if whole:
        delta = _dot(weights, grads, own, lanes)
    else:
        delta = _dot(grad_result, _at(call.out, item.out + row * call.out_row), call.width, lanes)
    _score_gradients(weights, grads, delta, own)
    if call.grad_bias != 0:
        at = _at(call.grad_bias, item.grad_bias + item.length_q - 1 + c0 - row)
        _add_scaled(at, grads, np.float32(1.0), own)
    if call.grad_dense != 0:
        column = call.grad_dense_column
        target = _floats(_at(call.grad_dense, item.grad_dense + row * call.grad_dense_row + c0 * column))
        source = _floats(grads)
        for j in range(own):
            target[j * column] += source[j]


def _work(pointer):  # type: ignore[no-untyped-def]
    """What one thread does: takes tickets, each a range of items, until none is left."""
    call = numba.carray(pointer, 1)[0]
    scratch = _at(call.scratch, _take(call.entered) * call.scratch_size)
    bounds = _integers(call.bounds)
    items = numba.carray(_items(call.items), bounds[call.tickets])
    ticket = _take(call.next)
    while ticket < call.tickets:
        for n in range(bounds[ticket], bounds[ticket + 1]):
            if call.backward != 0:
                _backward(call, items[n], scratch)
            else:
                _forward(call, items[n], scratch)
        ticket = _take(call.next)


@jit
def fold(total, grads, items, length):  # type: ignore[no-untyped-def]
    """Adds each item's sums by distance to `total`, (H, 2 length + 1) float64; the end bins take larger distances."""
    for item in items:
        for t in range(item.length_q + item.length_k - 1):
            distance = t - (item.length_q - 1) + item.key_start
            total[item.head, min(max(distance, -length), length) + length] += grads[item.grad_bias + t]
