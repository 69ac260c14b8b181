"""The Triton backend: host side of the kernels, registered with torch.library as one forward and one backward op.

Kernels: forward.py, backward.py, bias_gradient.py; their configurations: ops/triton/launch.py.
"""

import os

import torch
import triton
from torch import Tensor

from fat5.ops.attention.bias import RelativeBias
from fat5.ops.attention.triton.backward import key_gradient_kernel, query_gradient_kernel
from fat5.ops.attention.triton.bias_gradient import band_kernel, bins_kernel, dense_gradient_kernel, diagonal_kernel
from fat5.ops.attention.triton.configuration import band_configuration, configuration
from fat5.ops.attention.triton.forward import forward_kernel
from fat5.ops.attention.triton.tiles import DENSE, NO_BIAS, RELATIVE, work_list_kernel
from fat5.ops.triton.launch import Launch, run

MAX_HEAD_DIM, WORK_LIST_CHUNK, LOG2E = 128, 256, 1.4426950408889634
# Of the head dimension, in the bias gradients: larger ones spill.
FLOAT32_CHUNK, DENSE_CHUNK = 32, 64
# Most block offsets that a program of the band kernel serves with one load of its queries, as many tiles in registers,
# by head dimension; float32, which takes its queries in chunks, has one.
BAND_GROUP = {64: 3, 128: 1}
# The programs it then needs to fill the largest GPUs: two a processor, twice as many of the small ones.
BAND_PROGRAMS, SMALL_BAND_PROGRAMS = 264, 528
# End values of a relative bias repeated on either side of its vector: no less than block_m + block_n of any launch.
BIAS_PADDING = 256


def unsupported(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | Tensor | None, **arguments: object) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), q is on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it serves float16, bfloat16 and float32, q is {q.dtype}"
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        return f"it serves head dimensions 1 to {MAX_HEAD_DIM}, q has {q.shape[-1]}"
    return None


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias | Tensor | None,
    *,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """`fat5.ops.attention` with validated arguments."""
    if scale < 0.0:
        # The kernels find a row's maximum before they scale.
        q, scale = -q, -scale
    elif scale == 0.0:
        q, scale = q * 0.0, 1.0
    vector = bias.vector.float() if isinstance(bias, RelativeBias) else None
    dense = bias if isinstance(bias, Tensor) else None
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, vector, dense))
    prepared = prepare(q, k, vector, cu_seqlens_q, cu_seqlens_k, causal, scale, needs_grad, dropout_p > 0.0)
    out, _ = attention_forward(
        q, k, v, vector, dense, key_padding_mask, seed, cu_seqlens_q, cu_seqlens_k, *prepared, causal, scale, dropout_p
    )
    return out


def prepare(
    q: Tensor,
    k: Tensor,
    vector: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    needs_grad: bool,
    dropout: bool,
) -> tuple[Tensor | None, ...]:
    """What the kernels read besides their operands: the padded bias, and the work lists of the forward, dQ, dK/dV and
    band kernels.

    It depends on nothing that changes from layer to layer, and stands outside the operators that use it, so that
    torch.compile makes it once for all layers of a stack.
    """
    padded = None
    if vector is not None:
        # Over scale, its end values repeated on either side.
        scaled = vector.detach() / scale
        first, last = (scaled[:, end, None].expand(-1, BIAS_PADDING) for end in (0, -1))
        padded = torch.cat([first, scaled, last], dim=1)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return padded, None, None, None, None
    lists = work_lists(
        cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], q.shape[-1], q.dtype, causal, needs_grad, dropout
    )
    return padded, *lists


@torch.library.custom_op("fat5::triton_work_lists", mutates_args=())
def work_lists(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_rows: int,
    key_rows: int,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    needs_grad: bool,
    dropout: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(slots, 2) int32 of (document, block) for the forward, dQ, dK/dV and band kernels, the longest documents first.

    The last three are empty unless `needs_grad`. Documents that see the most keys in their last rows, because `causal`,
    start with those.
    """
    lists: list[Tensor] = []
    for starts, rows, block, last_first in _lists(cu_seqlens_q, cu_seqlens_k, query_rows, key_rows, head_dim, dtype,
                                                  causal, dropout):  # fmt: skip
        documents = len(starts) - 1
        capacity = _slots(rows, documents, block) if needs_grad or not lists else 0
        work = torch.empty((capacity, 2), dtype=torch.int32, device=starts.device)
        run(
            work_list_kernel,
            documents + 1 if capacity else 0,
            (starts, work, rows, documents, capacity),
            {"BLOCK": block, "CHUNK": WORK_LIST_CHUNK, "REVERSE": last_first},
        )
        lists.append(work)
    forward, rows_list, columns, band = lists
    return forward, rows_list, columns, band


@work_lists.register_fake
def _(cu_seqlens_q, cu_seqlens_k, query_rows, key_rows, head_dim, dtype, causal, needs_grad, dropout):  # type: ignore[no-untyped-def]
    described = _lists(cu_seqlens_q, cu_seqlens_k, query_rows, key_rows, head_dim, dtype, causal, dropout)
    sizes = [_slots(rows, starts.shape[0] - 1, block) for starts, rows, block, _ in described]
    return tuple(
        cu_seqlens_q.new_empty((size if needs_grad or not n else 0, 2), dtype=torch.int32)
        for n, size in enumerate(sizes)
    )


def _lists(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_rows: int,
    key_rows: int,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    dropout: bool,
) -> list[tuple[Tensor, int, int, bool]]:
    """(boundaries, rows, tile side, last tile first) of the four work lists."""
    forward, rows, columns = (
        configuration(kernel, cu_seqlens_q.device, head_dim, dtype, dropout)
        for kernel in ("forward", "query_gradient", "key_gradient")
    )
    band = band_configuration(cu_seqlens_q.device, head_dim, dtype, rows, dropout)
    return [
        (cu_seqlens_q, query_rows, forward.block_m, causal),
        (cu_seqlens_q, query_rows, rows.block_m, causal),
        (cu_seqlens_k, key_rows, columns.block_n, False),
        (cu_seqlens_q, query_rows, band.block_m, False),
    ]


def _slots(rows: int, documents: int, block: int) -> int:
    # Each document, and the rows after the last, can end in one partly filled tile.
    return rows // block + documents + 1


@torch.library.custom_op("fat5::triton_attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vector: Tensor | None,
    dense: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    padded: Tensor | None,
    forward_list: Tensor | None,
    rows_list: Tensor | None,
    columns_list: Tensor | None,
    band_list: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Returns out, of q's shape and strides where q is dense, and lse (B, H, Lq) or (H, Tq) fp32.

    `padded` and the lists are those of `prepare`.
    """
    out, lse = torch.empty_like(q), q.new_empty(_lse_shape(q, cu_seqlens_q), dtype=torch.float32)
    launch = configuration("forward", q.device, q.shape[-1], q.dtype, seed is not None and dropout_p > 0.0)
    problem = _Problem(
        q, k, v, vector, dense, key_padding_mask, seed, cu_seqlens_q, cu_seqlens_k, padded, causal, scale, dropout_p
    )
    starts, shape, programs = problem.tiles(forward_list, problem.query_rows, launch.block_m)
    inputs, bias_strides = problem.inputs()
    run(
        forward_kernel,
        programs,
        (
            *(*inputs, out, lse, starts, *map(problem.strides, (q, k, v, out)), problem.lse_strides, bias_strides),
            *(problem.mask_strides, *shape, problem.scale2, problem.threshold, problem.keep_scale),
        ),
        problem.constants(launch),
        launch,
    )
    return out, lse


@attention_forward.register_fake
def _(q, k, v, vector, dense, key_padding_mask, seed, cu_seqlens_q, *_rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), q.new_empty(_lse_shape(q, cu_seqlens_q), dtype=torch.float32)


@torch.library.custom_op("fat5::triton_attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vector: Tensor | None,
    dense: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    padded: Tensor | None,
    rows_list: Tensor | None,
    columns_list: Tensor | None,
    band_list: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v and of the bias in its own shape (empty unless `bias_needs_grad`)."""
    problem = _Problem(
        q, k, v, vector, dense, key_padding_mask, seed, cu_seqlens_q, cu_seqlens_k, padded, causal, scale, dropout_p
    )
    inputs, bias_strides = problem.inputs()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    exponent, delta = torch.empty_like(lse), torch.empty_like(lse)

    rows = configuration("query_gradient", q.device, q.shape[-1], q.dtype, problem.dropout)
    starts, shape, programs = problem.tiles(rows_list, problem.query_rows, rows.block_m)
    far_sums = lse.new_empty((programs, 2)) if vector is not None and bias_needs_grad else None
    run(
        query_gradient_kernel,
        programs,
        (
            *(*inputs, out, grad_out, lse, exponent, delta, grad_q, far_sums, starts),
            *(*map(problem.strides, (q, k, v, out, grad_out, grad_q)), problem.lse_strides, bias_strides),
            *(problem.mask_strides, *shape, problem.scale2, scale, problem.threshold, problem.keep_scale),
        ),
        problem.constants(rows) | {"FAR_SUMS": far_sums is not None},
        rows,
    )
    columns = configuration("key_gradient", q.device, q.shape[-1], q.dtype, problem.dropout)
    starts, shape, programs = problem.tiles(columns_list, problem.key_rows, columns.block_n)
    run(
        key_gradient_kernel,
        programs,
        (
            *(*inputs, grad_out, exponent, delta, grad_k, grad_v, starts),
            *(*map(problem.strides, (q, k, v, grad_out, grad_k, grad_v)), problem.lse_strides, bias_strides),
            *(problem.mask_strides, *shape, problem.scale2, scale, problem.threshold, problem.keep_scale),
        ),
        problem.constants(columns),
        columns,
    )
    if far_sums is not None:
        grad_bias = _vector_gradient(problem, grad_out, exponent, delta, far_sums, rows, band_list)
    elif dense is not None and bias_needs_grad:
        grad_bias = _dense_gradient(problem, grad_out, exponent, delta)
    else:
        grad_bias = lse.new_empty(0)
    return grad_q, grad_k, grad_v, grad_bias


@attention_backward.register_fake
def _(grad_out, q, k, v, vector, dense, *rest):  # type: ignore[no-untyped-def]
    bias, bias_needs_grad = dense if vector is None else vector, rest[-1]
    grad_bias = (
        q.new_empty(0, dtype=torch.float32) if bias is None or not bias_needs_grad else bias.new_empty(bias.shape)
    )
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad_bias


def _vector_gradient(
    problem: "_Problem",
    grad_out: Tensor,
    exponent: Tensor,
    delta: Tensor,
    far_sums: Tensor,
    rows: Launch,
    band_list: Tensor | None,
) -> Tensor:
    """(H, 2R+1) fp32: the band kernel's diagonals and the far sums that the dQ pass left behind, tiled as `rows`."""
    q, k, v, vector, causal = problem.q, problem.k, problem.v, problem.vector, problem.causal
    assert vector is not None
    grad_vector = torch.empty_like(vector, memory_format=torch.contiguous_format)
    R = vector.shape[1] // 2
    if R == 0 or not exponent.numel():
        # One number for all keys changes no softmax; and of no batch rows, or no heads, there is nothing to sum.
        return grad_vector.zero_()
    # Packed rows, whose work list `prepare` made, have no key mask.
    masked = problem.dropout or problem.key_mask is not None
    band = band_configuration(q.device, q.shape[-1], q.dtype, rows, masked)
    wider = max(rows.block_n, band.block_n)
    lowest = -((R + wider + rows.block_m - band.block_m - 2) // band.block_n)
    highest = (R + rows.block_m + wider - band.block_n - 2) // band.block_n
    if causal:
        highest = (band.block_m - 1) // band.block_n
    lowest = max(lowest, -triton.cdiv(problem.query_rows, band.block_n))
    highest = max(lowest, min(highest, triton.cdiv(problem.key_rows, band.block_n) - 1))
    offsets = highest - lowest + 1
    starts, shape, programs = problem.tiles(band_list, problem.query_rows, band.block_m)
    slots = programs // problem.heads
    most = 1 if q.dtype == torch.float32 else BAND_GROUP[64 if q.shape[-1] <= 64 else 128]
    groups = triton.cdiv(offsets, most)
    group = triton.cdiv(offsets, groups)
    wanted = BAND_PROGRAMS if group > 1 else SMALL_BAND_PROGRAMS
    splits = max(1, min(slots, triton.cdiv(wanted, problem.heads * groups)))
    partial = delta.new_empty((problem.heads, offsets, splits, band.block_m, band.block_n))
    constants = (
        problem.constants(band) | problem.chunk() | {"FAR_M": rows.block_m, "FAR_N": rows.block_n, "GROUP": group}
    )
    del constants["BIAS"]
    inputs, bias_strides = problem.inputs()
    run(
        band_kernel,
        problem.heads * groups * splits,
        (
            *(*inputs, grad_out, exponent, delta, partial, starts, *map(problem.strides, (q, k, v, grad_out))),
            *(problem.lse_strides, bias_strides, problem.mask_strides, *shape, slots, splits, offsets, lowest),
            *(problem.scale2, problem.threshold, problem.keep_scale),
        ),
        constants,
        band,
    )
    overlap = band.block_m // band.block_n + 1
    strips = offsets + overlap - 1
    diagonals = delta.new_empty((problem.heads, strips * band.block_n))
    tile = {"BLOCK_M": band.block_m, "BLOCK_N": band.block_n, "OVERLAP": overlap}
    run(diagonal_kernel, (problem.heads, strips), (partial, diagonals, offsets, splits, diagonals.shape[1]), tile)
    far_rows = 1 if problem.packed else q.shape[0]
    far_tiles = far_sums.shape[0] // (far_rows * problem.heads)
    lowest_distance = (lowest - overlap + 1) * band.block_n
    run(
        bins_kernel,
        problem.heads,
        (diagonals, far_sums, grad_vector, diagonals.shape[1], lowest_distance, far_rows, far_tiles, problem.heads, R),
        {"CHUNK": 256},
    )
    return grad_vector


def _dense_gradient(problem: "_Problem", grad_out: Tensor, exponent: Tensor, delta: Tensor) -> Tensor:
    """In the shape and dtype of the dense bias, summed in fp32."""
    q, k, v, dense = problem.q, problem.k, problem.v, problem.dense
    assert dense is not None
    grad_dense, (rows, columns) = dense.new_empty(dense.shape), dense.shape[2:]
    launch = configuration("dense_gradient", q.device, q.shape[-1], q.dtype, problem.dropout)
    documents = problem.num_documents if problem.packed else q.shape[0]
    sizes = (documents, dense.shape[0], dense.shape[1], rows, columns)
    constants = (
        problem.constants(launch) | problem.chunk(DENSE_CHUNK) | {"ONE_ROW": rows == 1, "ONE_COLUMN": columns == 1}
    )
    del constants["BIAS"]
    inputs, bias_strides = problem.inputs()
    run(
        dense_gradient_kernel,
        dense.shape[0] * dense.shape[1] * triton.cdiv(rows, launch.block_m) * triton.cdiv(columns, launch.block_n),
        (
            *(*inputs, grad_out, exponent, delta, grad_dense, problem.starts(None)),
            *(*map(problem.strides, (q, k, v, grad_out)), problem.lse_strides, bias_strides, grad_dense.stride()),
            *(problem.mask_strides, *problem.shape(0), sizes, problem.scale2, problem.threshold, problem.keep_scale),
        ),
        constants,
        launch,
    )
    return grad_dense


class _Problem:
    """One attention problem as the kernels want to hear of it."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        vector: Tensor | None,
        dense: Tensor | None,
        key_padding_mask: Tensor | None,
        seed: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        padded: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
    ) -> None:
        self.padded = padded
        self.q, self.k, self.v, self.vector, self.dense, self.seed, self.causal = q, k, v, vector, dense, seed, causal
        self.cu_seqlens_q, self.cu_seqlens_k = cu_seqlens_q, cu_seqlens_k
        self.packed = cu_seqlens_q is not None
        self.heads = q.shape[1]
        self.query_rows, self.key_rows = (q.shape[0], k.shape[0]) if self.packed else (q.shape[2], k.shape[2])
        self.num_documents = 0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1
        self.key_mask = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)
        self.mask_strides = (0, 0) if self.key_mask is None else self.key_mask.stride()
        self.scale, self.scale2 = scale, scale * LOG2E
        self.dropout = seed is not None and dropout_p > 0.0
        self.threshold = int(dropout_p * 2**32)
        self.keep_scale = 1.0 / (1.0 - dropout_p)
        self.lse_strides = (0, q.shape[0], 1) if self.packed else (q.shape[1] * q.shape[2], q.shape[2], 1)

    def strides(self, x: Tensor) -> tuple[int, int, int, int]:
        """(batch, head, row, dimension), in elements."""
        if self.packed:
            row, head, dimension = x.stride()
            return 0, head, row, dimension
        batch, head, row, dimension = x.stride()
        return batch, head, row, dimension

    def inputs(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """q, k, v, bias, key mask and seed as a kernel takes them, and the bias's strides."""
        bias = self.q
        strides: tuple[int, ...] = (0, 0, 0, 0)
        if self.padded is not None:
            # From distance 0 on.
            bias, strides = self.padded[:, self.padded.shape[1] // 2 :], (0, self.padded.shape[1], 0, 0)
        elif self.dense is not None:
            # A broadcast dimension is read again and again at stride 0.
            bias = self.dense
            strides = tuple(0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride()))
        # What is missing must still be some pointer: Triton 3.6 returns no None from a device function.
        mask = self.q if self.key_mask is None else self.key_mask
        seed = self.q if self.seed is None else self.seed
        return (self.q, self.k, self.v, bias, mask, seed), strides

    def tiles(self, work: Tensor | None, rows: int, block: int) -> tuple[tuple, tuple[int, ...], int]:
        """The `starts` and `shape` tuples of a kernel, and its number of programs; `work` is its list when packed."""
        if self.packed:
            assert work is not None
            assert work.shape[0] == _slots(rows, self.num_documents, block), "the list is of another tile"
            return self.starts(work), self.shape(work.shape[0]), work.shape[0] * self.heads
        tiles = triton.cdiv(rows, block)
        return self.starts(None), self.shape(tiles), tiles * self.heads * self.q.shape[0]

    def starts(self, work: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return work, self.cu_seqlens_q, self.cu_seqlens_k

    def shape(self, tiles: int) -> tuple[int, ...]:
        reach = 0 if self.vector is None else self.vector.shape[1] // 2
        return self.heads, self.query_rows, self.key_rows, self.num_documents, tiles, reach

    def constants(self, launch: Launch) -> dict[str, object]:
        """The compile-time arguments that every kernel takes."""
        assert launch.block_m + launch.block_n <= BIAS_PADDING
        bias = NO_BIAS
        if self.vector is not None:
            bias = RELATIVE
        elif self.dense is not None:
            bias = DENSE
        head_dim = self.q.shape[-1]
        exact = self.q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        return {
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "BIAS": bias.value,
            "CAUSAL": self.causal,
            "PACKED": self.packed,
            "HAS_KEY_MASK": self.key_mask is not None,
            "DROPOUT": self.dropout,
            "PRECISION": "tf32x3" if exact else "tf32",
        }

    def chunk(self, most: int = MAX_HEAD_DIM) -> dict[str, int]:
        """How much of the head dimension a bias gradient takes at a time."""
        whole = max(16, triton.next_power_of_2(self.q.shape[-1]))
        return {"CHUNK_D": min(whole, FLOAT32_CHUNK if self.q.dtype == torch.float32 else most)}


def _lse_shape(q: Tensor, cu_seqlens_q: Tensor | None) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else tuple(q.shape[:3])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, causal, scale, dropout_p = inputs
    out, lse = output
    del tensors[10]  # the forward's work list
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.options = (causal, scale, dropout_p)


def _backward(ctx, grad_out, _grad_lse):  # type: ignore[no-untyped-def]
    # Once: torch.utils.checkpoint refuses to recompute what is asked for again.
    saved = ctx.saved_tensors
    of_vector, of_dense = ctx.needs_input_grad[3:5]
    grad_q, grad_k, grad_v, grad_bias = attention_backward(grad_out, *saved, *ctx.options, of_vector or of_dense)
    grad_vector = grad_bias if of_vector else None
    grad_dense = grad_bias if of_dense else None
    return grad_q, grad_k, grad_v, grad_vector, grad_dense, *(None,) * 12


attention_forward.register_autograd(_backward, setup_context=_setup_context)
