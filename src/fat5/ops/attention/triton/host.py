"""How the Triton backend plans a call and launches its kernels.

Kernels: forward.py, backward.py, bias_gradient.py; their launch configurations: configuration.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fat5.ops.attention.bias import repeat_ends
from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.triton.backend import MAX_HEAD_DIM
from fat5.ops.attention.triton.backward import key_gradient_kernel, query_gradient_kernel
from fat5.ops.attention.triton.bias_gradient import band_kernel, bins_kernel, dense_gradient_kernel, diagonal_kernel
from fat5.ops.attention.triton.configuration import band_configuration, configuration
from fat5.ops.attention.triton.forward import forward_kernel
from fat5.ops.attention.triton.tiles import DENSE, NO_BIAS, RELATIVE, work_list_kernel
from fat5.ops.triton.launch import Launch, run

WORK_LIST_CHUNK, LOG2E = 256, 1.4426950408889634
# The largest part of the head dimension that a bias gradient takes at a time; a larger one spills.
FLOAT32_CHUNK, DENSE_CHUNK = 32, 64
# The most block offsets that a program of the band kernel serves with one load of its queries, by head dimension: it
# keeps a tile of each in registers. float32 takes its queries in chunks and has one.
BAND_GROUP = {64: 3, 128: 1}
# The programs it needs to fill the largest GPUs: two a multiprocessor, or four small ones.
BAND_PROGRAMS, SMALL_BAND_PROGRAMS = 264, 528
# End values of a relative bias repeated on either side of its vector: no less than block_m + block_n of any launch.
BIAS_PADDING = 256


def plan(call: AttentionCall) -> tuple[Tensor | None, ...]:
    """The padded bias, and the work lists of the forward, dQ, dK/dV and band kernels."""
    padded = None
    if call.vector is not None:
        scaled = call.vector.detach() if call.scale == 1.0 else call.vector.detach() / call.scale
        padded = repeat_ends(scaled, BIAS_PADDING)
    if not call.packed:
        return padded, None, None, None, None
    return padded, *work_lists(
        call.cu_seqlens_q, call.cu_seqlens_k, call.q.shape[0], call.k.shape[0], call.head_dim, call.q.dtype,
        call.causal, call.dropout_p > 0.0, call.dense is not None, call.needs_grad,
    )  # fmt: skip


@torch.library.custom_op(
    "fat5::triton_work_lists",
    mutates_args=(),
    schema="(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt query_rows, SymInt key_rows, int head_dim, "
    "ScalarType dtype, bool causal, bool dropout, bool dense, bool needs_grad) "
    "-> (Tensor forward, Tensor query_gradient, Tensor key_gradient, Tensor band)",
)
def work_lists(*arguments):  # type: ignore[no-untyped-def]
    """(slots, 2) int32 of (document, block) for the forward, dQ, dK/dV and band kernels, the longest documents first.

    The last three are empty unless `needs_grad`. Documents whose last rows see the most keys (`causal`) start with
    those.
    """
    lists = _empty_lists(*arguments)
    for work, starts, rows, block, last_first in lists:
        documents, capacity = len(starts) - 1, len(work)
        run(
            work_list_kernel,
            documents + 1 if capacity else 0,
            {"Starts": starts, "Work": work, "total": rows, "num_documents": documents, "capacity": capacity},
            {"BLOCK": block, "CHUNK": WORK_LIST_CHUNK, "REVERSE": last_first},
        )
    return tuple(work for work, *_ in lists)


@work_lists.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    return tuple(work for work, *_ in _empty_lists(*arguments))


def _empty_lists(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_rows: int,
    key_rows: int,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    dropout: bool,
    dense: bool,
    needs_grad: bool,
) -> list[tuple[Tensor, Tensor, int, int, bool]]:
    """The four lists, not yet filled, each with its boundaries, rows, tile side, and whether its last tile is first."""
    forward, rows, columns = (
        configuration(kernel, cu_seqlens_q.device, head_dim, dtype, dropout, dense)
        for kernel in ("forward", "query_gradient", "key_gradient")
    )
    band = band_configuration(cu_seqlens_q.device, head_dim, dtype, rows, dropout)
    documents = cu_seqlens_q.shape[0] - 1

    def empty(rows: int, block: int, needed: bool = needs_grad) -> Tensor:
        return cu_seqlens_q.new_empty((_slots(rows, documents, block) if needed else 0, 2))

    return [
        (empty(query_rows, forward.block_m, True), cu_seqlens_q, query_rows, forward.block_m, causal),
        (empty(query_rows, rows.block_m), cu_seqlens_q, query_rows, rows.block_m, causal),
        (empty(key_rows, columns.block_n), cu_seqlens_k, key_rows, columns.block_n, False),
        (empty(query_rows, band.block_m), cu_seqlens_q, query_rows, band.block_m, False),
    ]


def _slots(rows: int, documents: int, block: int) -> int:
    # Each document, and the rows after the last, can end in one partly filled tile.
    return rows // block + documents + 1


def forward(call: AttentionCall, plan: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp."""
    kernels = _Kernels(call, plan[0])
    out, lse = call.empty_like(call.q), call.empty_lse()
    launch = kernels.configuration("forward")
    kernels.run(
        forward_kernel,
        launch,
        *kernels.tiles(plan[1], kernels.query_rows, launch.block_m),
        {"Out": out, "Lse": lse, "out_strides": kernels.strides(out)},
        {"BIAS": kernels.bias_kind},
    )
    return out, lse


def backward(
    call: AttentionCall,
    plan: tuple[Tensor | None, ...],
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of the bias in its own shape (None unless asked for)."""
    padded, _, rows_list, columns_list, band_list = plan
    kernels = _Kernels(call, padded)
    grad_q, grad_k, grad_v = (call.empty_like(x) for x in (call.q, call.k, call.v))
    exponent, delta = torch.empty_like(lse), torch.empty_like(lse)
    upstream = {
        "GradOut": grad_out, "grad_out_strides": kernels.strides(grad_out), "Exponent": exponent, "Delta": delta
    }  # fmt: skip

    rows = kernels.configuration("query_gradient")
    tiles, programs = kernels.tiles(rows_list, kernels.query_rows, rows.block_m)
    far_sums = lse.new_empty((programs, 2)) if call.vector is not None and bias_needs_grad else None
    kernels.run(
        query_gradient_kernel,
        rows,
        tiles,
        programs,
        {
            **upstream, "Out": out, "Lse": lse, "GradQ": grad_q, "FarSums": far_sums, "raw_scale": call.scale,
            "out_strides": kernels.strides(out), "grad_q_strides": kernels.strides(grad_q),
        },
        {"BIAS": kernels.bias_kind, "FAR_SUMS": far_sums is not None},
    )  # fmt: skip
    columns = kernels.configuration("key_gradient")
    kernels.run(
        key_gradient_kernel,
        columns,
        *kernels.tiles(columns_list, kernels.key_rows, columns.block_n),
        {
            **upstream, "GradK": grad_k, "GradV": grad_v, "raw_scale": call.scale,
            "grad_k_strides": kernels.strides(grad_k), "grad_v_strides": kernels.strides(grad_v),
        },
        {"BIAS": kernels.bias_kind},
    )  # fmt: skip
    grad_bias = None
    if far_sums is not None:
        grad_bias = _vector_gradient(kernels, upstream, far_sums, rows, band_list)
    elif call.dense is not None and bias_needs_grad:
        grad_bias = _dense_gradient(kernels, upstream)
    return grad_q, grad_k, grad_v, grad_bias


def _vector_gradient(
    kernels: "_Kernels", upstream: dict[str, Any], far_sums: Tensor, rows: Launch, band_list: Tensor | None
) -> Tensor:
    """(H, 2R+1) fp32: the band kernel's diagonals and the far sums of the dQ pass, whose tiles are those of `rows`."""
    call, heads, delta = kernels.call, kernels.call.heads, upstream["Delta"]
    assert call.vector is not None
    grad_vector = torch.empty_like(call.vector, memory_format=torch.contiguous_format)
    R = call.vector.shape[1] // 2
    if R == 0 or not delta.numel():
        # One number for all keys changes no softmax; and of no batch rows, or no heads, there is nothing to sum.
        return grad_vector.zero_()
    # Packed calls, whose work list `plan` made, have no key mask.
    masked = call.dropout or call.key_padding_mask is not None
    band = band_configuration(call.q.device, call.head_dim, call.q.dtype, rows, masked)
    wider = max(rows.block_n, band.block_n)
    lowest = -((R + wider + rows.block_m - band.block_m - 2) // band.block_n)
    highest = (R + rows.block_m + wider - band.block_n - 2) // band.block_n
    if call.causal:
        highest = (band.block_m - 1) // band.block_n
    lowest = max(lowest, -triton.cdiv(kernels.query_rows, band.block_n))
    highest = max(lowest, min(highest, triton.cdiv(kernels.key_rows, band.block_n) - 1))
    offsets = highest - lowest + 1
    tiles, programs = kernels.tiles(band_list, kernels.query_rows, band.block_m)
    slots = programs // heads
    most = 1 if call.q.dtype == torch.float32 else BAND_GROUP[64 if call.head_dim <= 64 else 128]
    groups = triton.cdiv(offsets, most)
    group = triton.cdiv(offsets, groups)
    wanted = BAND_PROGRAMS if group > 1 else SMALL_BAND_PROGRAMS
    splits = max(1, min(slots, triton.cdiv(wanted, heads * groups)))
    partial = delta.new_empty((heads, offsets, splits, band.block_m, band.block_n))
    kernels.run(
        band_kernel,
        band,
        tiles,
        heads * groups * splits,
        {**upstream, "Partial": partial, "slots": slots, "splits": splits, "offsets": offsets, "lowest": lowest},
        kernels.chunk() | {"FAR_M": rows.block_m, "FAR_N": rows.block_n, "GROUP": group},
    )
    overlap = band.block_m // band.block_n + 1
    strips = offsets + overlap - 1
    width = strips * band.block_n
    diagonals = delta.new_empty((heads, width))
    run(
        diagonal_kernel,
        (heads, strips),
        {"Partial": partial, "Diagonals": diagonals, "offsets": offsets, "splits": splits, "width": width},
        {"BLOCK_M": band.block_m, "BLOCK_N": band.block_n, "OVERLAP": overlap},
    )
    far_rows = 1 if call.packed else call.documents
    run(
        bins_kernel,
        heads,
        {
            "Diagonals": diagonals, "FarSums": far_sums, "GradVector": grad_vector, "width": width,
            "lowest_distance": (lowest - overlap + 1) * band.block_n, "heads": heads, "R": R,
            "far_rows": far_rows, "far_tiles": far_sums.shape[0] // (far_rows * heads),
        },
        {"CHUNK": 256},
    )  # fmt: skip
    return grad_vector


def _dense_gradient(kernels: "_Kernels", upstream: dict[str, Any]) -> Tensor:
    """In the shape and dtype of the dense bias, summed in fp32."""
    call, dense = kernels.call, kernels.call.dense
    assert dense is not None
    grad_dense, (bias_documents, bias_heads, rows, columns) = dense.new_empty(dense.shape), dense.shape
    launch = kernels.configuration("dense_gradient")
    kernels.run(
        dense_gradient_kernel,
        launch,
        {"starts": (None, call.cu_seqlens_q, call.cu_seqlens_k), "tiles": 0},
        bias_documents * bias_heads * triton.cdiv(rows, launch.block_m) * triton.cdiv(columns, launch.block_n),
        {
            **upstream, "GradDense": grad_dense, "grad_dense_strides": grad_dense.stride(),
            "sizes": (call.documents, *dense.shape),
        },
        kernels.chunk(DENSE_CHUNK) | {"ONE_ROW": rows == 1, "ONE_COLUMN": columns == 1},
    )  # fmt: skip
    return grad_dense


class _Kernels:
    """Launches kernels for one call: every kernel takes the same operands, under the same names."""

    def __init__(self, call: AttentionCall, padded: Tensor | None) -> None:
        self.call = call
        q, k, packed = call.q, call.k, call.packed
        self.query_rows, self.key_rows = (len(q), len(k)) if packed else (q.shape[2], k.shape[2])
        heads, head_dim, documents = q.shape[1], q.shape[-1], call.documents
        # What a call lacks must still be some pointer: Triton 3.6 returns no None from a device function.
        bias, self.bias_kind, reach = q, NO_BIAS.value, 0
        bias_strides: tuple[int, ...] = (0, 0, 0, 0)
        if call.vector is not None:
            assert padded is not None
            # From distance 0 on.
            width, reach = padded.shape[1], call.vector.shape[1] // 2
            bias, bias_strides, self.bias_kind = padded[:, width // 2 :], (0, width, 0, 0), RELATIVE.value
        elif call.dense is not None:
            # A broadcast dimension is read again and again at stride 0.
            strides = [0 if size == 1 else stride for size, stride in zip(call.dense.shape, call.dense.stride())]
            bias, bias_strides, self.bias_kind = call.dense, tuple(strides), DENSE.value
        mask = None if call.key_padding_mask is None else call.key_padding_mask.view(torch.uint8)
        rows = self.query_rows
        self.arguments: dict[str, Any] = {
            "Q": q, "K": k, "V": call.v, "Bias": bias,
            "KeyMask": q if mask is None else mask, "Seed": q if call.seed is None else call.seed,
            "q_strides": self.strides(q), "k_strides": self.strides(k), "v_strides": self.strides(call.v),
            "lse_strides": (0, rows, 1) if packed else (heads * rows, rows, 1),
            "bias_strides": bias_strides, "mask_strides": (0, 0) if mask is None else mask.stride(),
            "heads": heads, "query_rows": rows, "key_rows": self.key_rows,
            "num_documents": documents if packed else 0, "reach": reach,
            "scale": call.scale * LOG2E, "threshold": int(call.dropout_p * 2**32),
            "keep_scale": 1.0 / (1.0 - call.dropout_p),
        }  # fmt: skip
        exact = q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        self.block_d = max(16, 1 << (head_dim - 1).bit_length())
        self.constants = {
            "HEAD_DIM": head_dim, "BLOCK_D": self.block_d, "CAUSAL": call.causal, "PACKED": packed,
            "HAS_KEY_MASK": mask is not None, "DROPOUT": call.dropout, "PRECISION": "tf32x3" if exact else "tf32",
        }  # fmt: skip

    def run(
        self,
        kernel: Any,
        launch: Launch,
        tiles: dict[str, Any],
        programs: int,
        arguments: dict[str, Any],
        constants: dict[str, Any],
    ) -> None:
        """Launches `kernel` with the operands of the call, and with `arguments` and `constants` of its own."""
        assert launch.block_m + launch.block_n <= BIAS_PADDING
        own = {**self.constants, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, **constants}
        run(kernel, programs, {**self.arguments, **tiles, **arguments}, own, launch)

    def configuration(self, kernel: str) -> Launch:
        call, q = self.call, self.call.q
        return configuration(kernel, q.device, call.head_dim, q.dtype, call.dropout, call.dense is not None)

    def strides(self, x: Tensor) -> tuple[int, int, int, int]:
        """(batch, head, row, dimension), in elements."""
        *batch, first, second, dimension = x.stride()
        return (batch[0], first, second, dimension) if batch else (0, second, first, dimension)

    def tiles(self, work: Tensor | None, rows: int, block: int) -> tuple[dict[str, Any], int]:
        """The arguments that say which tile a program takes, and the number of programs; `work` is the list of a
        packed call."""
        call = self.call
        if call.packed:
            assert work is not None
            assert work.shape[0] == _slots(rows, call.documents, block), "the list is of another tile"
            starts = (work, call.cu_seqlens_q, call.cu_seqlens_k)
            return {"starts": starts, "tiles": work.shape[0]}, work.shape[0] * call.heads
        tiles = triton.cdiv(rows, block)
        return {"starts": (None, None, None), "tiles": tiles}, tiles * call.heads * call.documents

    def chunk(self, most: int = MAX_HEAD_DIM) -> dict[str, int]:
        """How much of the head dimension a bias gradient takes at a time."""
        return {"CHUNK_D": min(self.block_d, FLOAT32_CHUNK if self.call.q.dtype == torch.float32 else most)}
