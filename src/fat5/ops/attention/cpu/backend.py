"""Attention on the CPU in linear memory: how a call becomes tasks, one for each head of each document.

The arithmetic is in kernels.py; threads (threads.py) take the tasks in turn. A task writes its own rows only, so
results do not depend on the number of threads. A relative bias is read, and its gradient summed, by distance; it never
becomes a matrix (docs/attention.md, "On the CPU").
"""

import numpy as np
import torch
from torch import Tensor

from fat5.ops.attention.call import AttentionCall

# Least scores of a ticket (a few microseconds of work), and most tickets of a thread.
SMALLEST_TICKET, TICKETS_A_THREAD = 20_000, 16
# The cost of packing and writing a row or a key, in scores.
ROW_COST = 40


def unsupported(call: AttentionCall) -> str | None:
    """Why this path cannot serve a call, or None. For meta tensors it gives the shapes."""
    if call.q.device.type not in ("cpu", "meta"):
        return f"it serves tensors on the CPU, q is on {call.q.device}"
    if call.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it serves float32, bfloat16 and float16, q is {call.q.dtype}; use backend='reference'"
    return None


def plan(call: AttentionCall) -> tuple[()]:
    """Nothing is prepared ahead."""
    return ()


def forward(call: AttentionCall, plan: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp."""
    tasks, lse = _Tasks(call), call.empty_lse().fill_(float("-inf"))
    out = torch.zeros(tasks.q.shape)
    tasks.forward(out, lse)
    return tasks.caller_layout(out), lse


def backward(
    call: AttentionCall,
    plan: tuple[Tensor | None, ...],
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of the bias in its own shape (None unless asked for)."""
    tasks = _Tasks(call)
    grads = [torch.zeros(x.shape) for x in (tasks.q, tasks.k, tasks.v)]
    grad_bias = tasks.backward(grad_out, out, lse, grads, bias_needs_grad)
    grad_q, grad_k, grad_v = (tasks.caller_layout(grad) for grad in grads)
    return grad_q, grad_k, grad_v, grad_bias


class _Tasks:
    """The tasks of one call, over float32 tensors with tokens before heads: (B, L, H, D) or (T, H, D)."""

    def __init__(self, call: AttentionCall) -> None:
        # numba takes a while to import, and only a call needs it.
        from fat5.ops.attention.cpu import kernels

        self.kernels, self.packed, self.dtype = kernels, call.packed, call.q.dtype
        self.q, self.k, self.v = (self._tokens_first(x) for x in (call.q, call.k, call.v))
        self.heads, self.width = self.q.shape[-2:]
        self.vector, self.dense = call.vector, None if call.dense is None else call.dense.float()
        self.dense_dtype = None if call.dense is None else call.dense.dtype
        self.visible = None
        if self.packed:
            starts_q = call.cu_seqlens_q.numpy().astype(np.int64)  # type: ignore[union-attr]
            starts_k = call.cu_seqlens_k.numpy().astype(np.int64)  # type: ignore[union-attr]
            self.start_q, self.start_k = starts_q[:-1], starts_k[:-1]
            self.length_q, self.length_k = np.diff(starts_q), np.diff(starts_k)
            self.batch = self.key_start = np.zeros_like(self.start_q)
        else:
            (rows, length_q), length_k = self.q.shape[:2], self.k.shape[1]
            self.batch, self.length_q, self.length_k = np.arange(rows), np.full(rows, length_q), np.full(rows, length_k)
            self.start_q = self.start_k = np.zeros(rows, np.int64)
            if call.key_padding_mask is not None and length_k > 0:
                visible = call.key_padding_mask.numpy()
                # From the first visible key to the last.
                self.start_k = visible.argmax(axis=1)
                end = length_k - visible[:, ::-1].argmax(axis=1)
                self.length_k = np.where(visible.any(axis=1), end - self.start_k, 0)
                if (visible.sum(axis=1) != self.length_k).any():
                    self.visible = np.ascontiguousarray(visible)
                    # The holes may hold NaN, and 0 * NaN would spread it.
                    hidden = ~call.key_padding_mask[:, :, None, None]
                    self.k, self.v = (x.masked_fill(hidden, 0.0) for x in (self.k, self.v))
            self.key_start = self.start_k
        self.record = np.zeros(1, kernels.CALL)
        self.record["width"], self.record["causal"], self.record["scale"] = self.width, call.causal, call.scale
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            self.record[name], self.record[f"{name}_row"] = x.data_ptr(), x.stride(-3)
        self.seed = call.seed
        if call.seed is not None:
            self.record["seed"], self.record["threshold"] = call.seed.data_ptr(), int(call.dropout_p * 2**32)
            self.record["keep_scale"] = 1.0 / (1.0 - call.dropout_p)
        if self.visible is not None:
            self.record["visible"] = self.visible.ctypes.data
        if self.dense is not None:
            self.record["dense"] = self.dense.data_ptr()
            _, _, self.record["dense_row"], self.record["dense_column"] = _broadcast_strides(self.dense)
        self.items = self._items()

    def caller_layout(self, x: Tensor) -> Tensor:
        return (x if self.packed else x.transpose(1, 2)).to(self.dtype)

    def forward(self, out: Tensor, lse: Tensor) -> None:
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

    def backward(
        self, grad_out: Tensor, out: Tensor, lse: Tensor, grads: list[Tensor], bias_needs_grad: bool
    ) -> Tensor | None:
        """Fills the gradients of q, k and v; returns that of the bias."""
        grad_out, out = self._tokens_first(grad_out), self._tokens_first(out).contiguous()
        self._takes_result(out, lse)
        record, items = self.record, self.items
        record["backward"], record["grad_out"], record["grad_out_row"] = 1, grad_out.data_ptr(), grad_out.stride(-3)
        items["grad_out"] = self._offsets(grad_out, self.start_q)
        record["grad_q"], record["grad_k"], record["grad_v"] = (grad.data_ptr() for grad in grads)
        record["grad_k_row"] = grads[1].stride(-3)
        items["grad_k"] = self._offsets(grads[1], self.start_k)
        if bias_needs_grad and self.dense is not None:
            grad_dense = torch.zeros(self.dense.shape)
            record["grad_dense"] = grad_dense.data_ptr()
            _, _, record["grad_dense_row"], record["grad_dense_column"] = _broadcast_strides(grad_dense)
            items["grad_dense"] = self._dense_offsets(grad_dense)
            self._start(items, self.kernels.backward_scratch, True)
            return grad_dense.to(self.dense_dtype)
        distances = items["length_q"] + items["length_k"] - 1
        items["grad_bias"] = distances.cumsum() - distances
        by_distance = np.zeros(int(distances.sum()) if bias_needs_grad else 0, np.float32)
        if bias_needs_grad and len(by_distance):
            record["grad_bias"] = by_distance.ctypes.data
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
        self.record["out"], self.record["out_row"] = out.data_ptr(), out.stride(-3)
        self.record["lse"], self.record["lse_row"] = lse.data_ptr(), lse.stride(-1)
        self.items["out"] = self._offsets(out, self.start_q)
        self.items["lse"] = self._offsets(lse.transpose(-1, -2)[..., None], self.start_q)
        self.kept = (out, lse)

    def _items(self) -> np.ndarray:
        """A record for each head of each document with queries and keys, head by head."""
        documents = self.documents = np.flatnonzero((self.length_q > 0) & (self.length_k > 0))
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
            # The bias of head h at distance d is at [h, d + longest - 1].
            longest, farthest = int(items["length_q"].max()), int((items["key_start"] + items["length_k"]).max())
            reach = self.vector.shape[1] // 2
            distance = torch.arange(1 - longest, farthest).clamp(-reach, reach) + reach
            self.extended = self.vector.index_select(1, distance)
            self.record["bias"] = self.extended.data_ptr()
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
        record = self.record
        record["items"], record["bounds"], record["tickets"] = items.ctypes.data, bounds.ctypes.data, tickets
        record["scratch"], record["scratch_size"] = scratch.data_ptr(), scratch.shape[1]
        taken = np.zeros(2, np.int64)
        record["entered"], record["next"] = taken.ctypes.data, taken.ctypes.data + taken.itemsize
        run(record.ctypes.data, threads)


def _broadcast_strides(x: Tensor) -> list[int]:
    """Strides, 0 along a dimension of one."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride())]
