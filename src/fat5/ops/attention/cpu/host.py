"""Attention on the CPU in linear memory: the custom operators, and how a call becomes heads of documents.

The arithmetic is in cpu_kernels.py: each head of each document is a task, which threads take in turn (cpu_threads.py).
A task writes its own rows only, so results do not depend on the number of threads. A relative bias is read, and its
gradient summed, by distance; it never becomes a matrix (docs/attention.md, "On the CPU").
"""

import numpy as np
import torch
from torch import Tensor

from fat5.ops.attention.bias import RelativeBias

# A ticket holds so many scores or more, a few microseconds of work, and there are at most so many tickets a thread.
SMALLEST_TICKET, TICKETS_A_THREAD = 20_000, 16
# What a row or a key costs beside the scores, in scores: it is packed and written.
ROW_COST = 40


def attention_cpu(
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
    """The CPU backend of `fat5.ops.attention`: float32, bfloat16 or float16; arguments validated by the caller."""
    vector = bias.vector.float() if isinstance(bias, RelativeBias) else None
    dense = bias if isinstance(bias, Tensor) else None
    out, _ = _attention(
        q, k, v, vector, dense, causal, scale, dropout_p, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        key_padding_mask,
    )  # fmt: skip
    return out


@torch.library.custom_op("fat5::attention_cpu", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vector: Tensor | None,
    dense: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out, and the log-sum-exp of each row, float32, (B, Lq, H) or (Tq, H), -inf where a row sees nothing."""
    problem = _Problem(
        q, k, v, vector, dense, causal, scale, dropout_p, seed, cu_seqlens_q, cu_seqlens_k, key_padding_mask
    )
    out, lse = torch.zeros(problem.q.shape), torch.full(problem.q.shape[:-1], float("-inf"))
    problem.run(out, lse)
    return problem.caller_layout(out), lse


@torch.library.custom_op("fat5::attention_cpu_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    vector: Tensor | None,
    dense: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_padding_mask: Tensor | None,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the bias in its own shape (empty when not asked for)."""
    problem = _Problem(
        q, k, v, vector, dense, causal, scale, dropout_p, seed, cu_seqlens_q, cu_seqlens_k, key_padding_mask
    )
    grads = [torch.zeros(x.shape) for x in (problem.q, problem.k, problem.v)]
    grad_bias = problem.run_backward(grad_out, out, lse, grads, bias_needs_grad)
    grad_q, grad_k, grad_v = (problem.caller_layout(grad) for grad in grads)
    return grad_q, grad_k, grad_v, q.new_empty(0) if grad_bias is None else grad_bias


@_attention.register_fake
def _(q, k, v, vector, dense, causal, scale, dropout_p, seed, cu_q, cu_k, max_q, max_k, mask):  # type: ignore[no-untyped-def]
    out = q.new_empty(q.shape) if cu_q is not None else q.new_empty(_tokens_first_shape(q)).transpose(1, 2)
    return out, q.new_empty(_tokens_first_shape(q)[:-1] if cu_q is None else q.shape[:-1], dtype=torch.float32)


@_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_out, q, k, v, out, lse, vector, dense, causal, scale, dropout_p, seed, cu_q, cu_k, max_q, max_k, mask, needs
):
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape) if cu_q is not None else x.new_empty(_tokens_first_shape(x)).transpose(1, 2)

    bias = vector if vector is not None else dense
    return like(q), like(k), like(v), q.new_empty(0) if not needs else bias.new_empty(bias.shape)


def _tokens_first_shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], x.shape[2], x.shape[1], x.shape[3])


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, vector, dense, causal, scale, dropout_p, seed, cu_q, cu_k, max_q, max_k, mask = inputs
    ctx.save_for_backward(q, k, v, *output, vector, dense, seed, cu_q, cu_k, mask)
    ctx.settings = (causal, scale, dropout_p, max_q, max_k)


def _gradients(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, vector, dense, seed, cu_q, cu_k, mask = ctx.saved_tensors
    causal, scale, dropout_p, max_q, max_k = ctx.settings
    needs_bias = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    grad_q, grad_k, grad_v, grad_bias = _attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        vector,
        dense,
        causal,
        scale,
        dropout_p,
        seed,
        cu_q,
        cu_k,
        max_q,
        max_k,
        mask,
        needs_bias,
    )
    grad_vector = grad_bias if ctx.needs_input_grad[3] else None
    grad_dense = grad_bias if ctx.needs_input_grad[4] else None
    return grad_q, grad_k, grad_v, grad_vector, grad_dense, *(None,) * 9


_attention.register_autograd(_gradients, setup_context=_save)


class _Problem:
    """One call, with tokens before heads, (B, L, H, D) or (T, H, D), in float32, and its tasks."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        vector: Tensor | None,
        dense: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        key_padding_mask: Tensor | None,
    ) -> None:
        # numba takes a while to import, and only a call needs it.
        from fat5.ops.attention.cpu import kernels as cpu_kernels

        self.kernels = cpu_kernels
        self.packed, self.dtype = cu_seqlens_q is not None, q.dtype
        self.q, self.k, self.v = (self._tokens_first(x) for x in (q, k, v))
        self.heads, self.width = self.q.shape[-2:]
        self.vector, self.dense = vector, None if dense is None else dense.float()
        self.dense_dtype = None if dense is None else dense.dtype
        self.visible = None
        if self.packed:
            starts_q, starts_k = cu_seqlens_q.numpy(), cu_seqlens_k.numpy()  # type: ignore[union-attr]
            self.batch = np.zeros(len(starts_q) - 1, np.int64)
            self.start_q, self.start_k = starts_q[:-1].astype(np.int64), starts_k[:-1].astype(np.int64)
            self.length_q, self.length_k = np.diff(starts_q).astype(np.int64), np.diff(starts_k).astype(np.int64)
            self.key_start = np.zeros_like(self.batch)
        else:
            rows, length_k = self.q.shape[0], self.k.shape[1]
            self.batch, self.start_q = np.arange(rows), np.zeros(rows, np.int64)
            self.length_q, self.length_k = np.full(rows, self.q.shape[1]), np.full(rows, length_k)
            self.start_k = np.zeros(rows, np.int64)
            if key_padding_mask is not None and length_k > 0:
                visible = key_padding_mask.numpy()
                some = visible.any(axis=1)
                self.start_k = np.where(some, visible.argmax(axis=1), 0)
                end = np.where(some, length_k - visible[:, ::-1].argmax(axis=1), 0)
                self.length_k = end - self.start_k
                if (visible.sum(axis=1) != self.length_k).any():
                    self.visible = np.ascontiguousarray(visible)
                    # What stands in the holes may be NaN, and 0 * NaN would spread it.
                    hidden = ~key_padding_mask[:, :, None, None]
                    self.k, self.v = (x.masked_fill(hidden, 0.0) for x in (self.k, self.v))
            self.key_start = self.start_k
        self.call = np.zeros(1, self.kernels.CALL)
        self.call["width"], self.call["causal"], self.call["scale"] = self.width, causal, scale
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            self.call[name], self.call[f"{name}_row"] = x.data_ptr(), x.stride(-3)
        self.seed = seed
        if seed is not None:
            self.call["seed"], self.call["threshold"] = seed.data_ptr(), int(dropout_p * 2**32)
            self.call["keep_scale"] = 1.0 / (1.0 - dropout_p)
        if self.visible is not None:
            self.call["visible"] = self.visible.ctypes.data
        if self.dense is not None:
            self.call["dense"] = self.dense.data_ptr()
            _, _, self.call["dense_row"], self.call["dense_column"] = _broadcast_strides(self.dense)
        self.items = self._items()

    def caller_layout(self, x: Tensor) -> Tensor:
        return (x if self.packed else x.transpose(1, 2)).to(self.dtype)

    def run(self, out: Tensor, lse: Tensor) -> None:
        """Fills `out` and `lse`, but for rows that see nothing."""
        self._takes_result(out, lse)
        chunk = self.kernels.CHUNK_ROWS
        chunks = -(-self.items["last"] // chunk)
        items = np.repeat(self.items, chunks)
        if len(items) > len(self.items):
            nth = np.arange(len(items)) - np.repeat(chunks.cumsum() - chunks, chunks)
            items["first"] = nth * chunk
            items["last"] = np.minimum(items["first"] + chunk, items["last"])
        self._start(items, self.kernels.forward_scratch, False)

    def run_backward(
        self, grad_out: Tensor, out: Tensor, lse: Tensor, grads: list[Tensor], bias_needs_grad: bool
    ) -> Tensor | None:
        """Fills the gradients of q, k and v; returns that of the bias."""
        grad_out, out = self._tokens_first(grad_out), self._tokens_first(out).contiguous()
        self._takes_result(out, lse)
        call, items = self.call, self.items
        call["backward"], call["grad_out"], call["grad_out_row"] = 1, grad_out.data_ptr(), grad_out.stride(-3)
        items["grad_out"] = self._offsets(grad_out, self.start_q)
        call["grad_q"], call["grad_k"], call["grad_v"] = (grad.data_ptr() for grad in grads)
        call["grad_k_row"] = grads[1].stride(-3)
        items["grad_k"] = self._offsets(grads[1], self.start_k)
        if bias_needs_grad and self.dense is not None:
            grad_dense = torch.zeros(self.dense.shape)
            call["grad_dense"] = grad_dense.data_ptr()
            _, _, call["grad_dense_row"], call["grad_dense_column"] = _broadcast_strides(grad_dense)
            items["grad_dense"] = self._dense_offsets(grad_dense)
            self._start(items, self.kernels.backward_scratch, True)
            return grad_dense.to(self.dense_dtype)
        distances = items["length_q"] + items["length_k"] - 1
        items["grad_bias"] = distances.cumsum() - distances
        by_distance = np.zeros(int(distances.sum()) if bias_needs_grad else 0, np.float32)
        if bias_needs_grad and len(by_distance):
            call["grad_bias"] = by_distance.ctypes.data
        self._start(items, self.kernels.backward_scratch, False)
        if not bias_needs_grad:
            return None
        total = np.zeros(self.vector.shape)  # type: ignore[union-attr]
        self.kernels.fold(total, by_distance, items, total.shape[1] // 2)
        return torch.from_numpy(total).to(self.vector.dtype)  # type: ignore[union-attr]

    def _tokens_first(self, x: Tensor) -> Tensor:
        x = x.float() if self.packed else x.float().transpose(1, 2)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def _takes_result(self, out: Tensor, lse: Tensor) -> None:
        self.call["out"], self.call["out_row"] = out.data_ptr(), out.stride(-3)
        self.call["lse"], self.call["lse_row"] = lse.data_ptr(), lse.stride(-2)
        self.items["out"] = self._offsets(out, self.start_q)
        self.items["lse"] = self._offsets(lse[..., None], self.start_q)
        self.kept = (out, lse)

    def _items(self) -> np.ndarray:
        """A record for each head of each document with queries and keys, head by head."""
        self.documents = np.flatnonzero((self.length_q > 0) & (self.length_k > 0))
        documents = self.documents
        items = np.zeros(self.heads * len(documents), self.kernels.ITEM)
        grid = items.reshape(self.heads, len(documents))
        grid["head"] = np.arange(self.heads)[:, None]
        grid["document"] = documents
        grid["last"] = grid["length_q"] = self.length_q[documents]
        grid["length_k"], grid["key_start"] = self.length_k[documents], self.key_start[documents]
        items["q"] = self._offsets(self.q, self.start_q)
        items["k"], items["v"] = self._offsets(self.k, self.start_k), self._offsets(self.v, self.start_k)
        if self.visible is not None:
            grid["visible"] = (self.batch * self.visible.shape[1] + self.start_k)[documents]
        if self.vector is not None and len(items):
            # A distance d of head h stands at [h, d + longest - 1].
            longest, farthest = int(items["length_q"].max()), int((items["key_start"] + items["length_k"]).max())
            reach = self.vector.shape[1] // 2
            distance = torch.arange(1 - longest, farthest).clamp(-reach, reach) + reach
            self.extended = self.vector.index_select(1, distance)
            self.call["bias"] = self.extended.data_ptr()
            items["bias"] = items["head"] * self.extended.shape[1] + longest - 1 + items["key_start"]
        if self.dense is not None:
            items["dense"] = self._dense_offsets(self.dense)
        return items

    def _offsets(self, x: Tensor, start: np.ndarray) -> np.ndarray:
        """Where each item begins in a tensor with tokens first."""
        rows = start * x.stride(-3) + (0 if self.packed else self.batch * x.stride(0))
        return (np.arange(self.heads)[:, None] * x.stride(-2) + rows[self.documents]).ravel()

    def _dense_offsets(self, x: Tensor) -> np.ndarray:
        document, head, _, column = _broadcast_strides(x)
        rows = self.documents * document + self.key_start[self.documents] * column
        return (np.arange(self.heads)[:, None] * head + rows).ravel()

    def _start(self, items: np.ndarray, scratch_size, shares_heads: bool) -> None:  # type: ignore[no-untyped-def]
        """Runs all items; with `shares_heads` those of one head write to one place, and are one ticket."""
        if not len(items):
            return
        from fat5.ops.attention.cpu.threads import run

        threads = torch.get_num_threads()
        rows, keys = items["last"] - items["first"], items["length_k"]
        done = (rows * keys + ROW_COST * (rows + keys)).cumsum()
        ticket = done // max(SMALLEST_TICKET, int(done[-1]) // (threads * TICKETS_A_THREAD))
        if shares_heads:
            ticket = items["head"] if self.dense.shape[1] > 1 else np.zeros_like(items["head"])  # type: ignore[union-attr]
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(ticket)) + 1, [len(items)]]).astype(np.int64)
        tickets = len(bounds) - 1
        threads = min(threads, tickets)
        size = scratch_size(self.width, int(keys.max()))
        scratch = torch.empty(threads, -(-size // 16) * 16)
        call = self.call
        call["items"], call["bounds"], call["tickets"] = items.ctypes.data, bounds.ctypes.data, tickets
        call["scratch"], call["scratch_size"] = scratch.data_ptr(), scratch.shape[1]
        taken = np.zeros(2, np.int64)
        call["entered"], call["next"] = taken.ctypes.data, taken.ctypes.data + taken.itemsize
        run(call.ctypes.data, threads)


def _broadcast_strides(x: Tensor) -> list[int]:
    """Strides, 0 along a dimension of one."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride())]
