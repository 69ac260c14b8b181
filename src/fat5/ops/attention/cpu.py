"""Attention on the CPU in linear memory: the custom operators, and the walk over documents. The arithmetic is in
cpu_kernels.py.

Two ideas make it fast (docs/attention.md, "On the CPU"):

- PyTorch's fused CPU kernel adds a mask it reads through strides. A relative bias is constant along diagonals, and
  with the queries in reverse order it is constant along *anti*-diagonals: entry (i', j) is ext[i' + j + shift], a
  strided view with strides (1, 1) of the short vector. So the mask of any document is a view that stays in cache, and
  no L x L bias exists.
- Where the bias needs a gradient, the backward runs in tiles of plain PyTorch that stay in cache, with dS at hand.
  dS is written into a skewed buffer, so that summing its anti-diagonals is summing columns (decision 0030).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fat5.ops.attention import cpu_kernels as kernels
from fat5.ops.attention.bias import RelativeBias

# Rows of a causal document are walked in blocks of this many, so that keys in the future of a whole block cost nothing.
CAUSAL_BLOCK = 512


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
    walk = Walk(cu_seqlens_q, cu_seqlens_k, key_padding_mask, causal, vector, dense, max_seqlen_q, max_seqlen_k)
    q, k, v = walk.reversed(walk.tokens_first(q)), walk.tokens_first(k), walk.tokens_first(v)
    parts = list(walk.parts(q, k))
    if len(parts) == 1 and parts[0].covers(q):
        part = parts[0]
        mine = (part.of_queries(q), part.of_keys(k), part.of_keys(v))
        part_out, part_lse = kernels.forward(*mine, part.mask, scale, part.dropout(dropout_p, seed))
        out, lse = part_out.transpose(1, 2), part_lse.transpose(1, 2)
        return walk.caller_layout(walk.reversed(out).contiguous()), walk.reversed(lse).contiguous()
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:-1], float("-inf"))
    for part in parts:
        part_out, part_lse = kernels.forward(
            part.of_queries(q), part.of_keys(k), part.of_keys(v), part.mask, scale, part.dropout(dropout_p, seed)
        )
        part.of_queries(out).copy_(part_out)
        part.of_queries(lse[..., None])[..., 0].copy_(part_lse)
    return walk.caller_layout(walk.reversed(out)), walk.reversed(lse)


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
    walk = Walk(cu_seqlens_q, cu_seqlens_k, key_padding_mask, causal, vector, dense, max_seqlen_q, max_seqlen_k)
    grad_out, q = walk.reversed(walk.tokens_first(grad_out)), walk.reversed(walk.tokens_first(q))
    out = walk.tokens_first(out)
    if max_seqlen_k > kernels.TILE_KEYS or not (bias_needs_grad or seed is not None):
        out = walk.reversed(out)  # else nobody reads it
    lse = walk.reversed(lse)
    k, v = walk.tokens_first(k), walk.tokens_first(v)
    grad_q, grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grad_bias = walk.new_grad_bias() if bias_needs_grad else None
    buffers = kernels.Buffers()
    for part in walk.parts(q, k):
        kernels.backward(
            part.of_queries(grad_out),
            part.of_queries(q),
            part.of_keys(k),
            part.of_keys(v),
            part.of_queries(out),
            part.of_queries(lse[..., None])[..., 0],
            part.mask,
            scale,
            part.dropout(dropout_p, seed),
            (part.of_queries(grad_q), part.of_keys(grad_k), part.of_keys(grad_v)),
            None if grad_bias is None else part.grad_bias(grad_bias),
            buffers,
        )
    return (
        walk.caller_layout(walk.reversed(grad_q)),
        walk.caller_layout(grad_k),
        walk.caller_layout(grad_v),
        q.new_empty(0) if grad_bias is None else walk.fold_grad_bias(grad_bias),
    )


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


@dataclass
class Walk:
    """One call as a sequence of parts, each a block of queries and the contiguous keys it may see.

    Inside, every tensor has its tokens before its heads, (B, L, H, D) or (T, H, D), and when the bias is a vector (or
    the call causal, a bias of 0 and -inf) its queries are in reverse order.
    """

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    key_padding_mask: Tensor | None
    causal: bool
    vector: Tensor | None
    dense: Tensor | None
    max_q: int
    max_k: int

    def __post_init__(self) -> None:
        self.packed = self.cu_seqlens_q is not None
        self.reverse = self.dense is None and (self.vector is not None or self.causal)
        self.reach = 0 if self.vector is None else self.vector.shape[1] // 2
        if self.reverse:
            # Distance d stands at d + max_q - 1.
            distance = torch.arange(1 - self.max_q, max(self.max_k, 1))
            vector = torch.zeros(1, 1) if self.vector is None else self.vector
            self.extended = vector[:, distance.clamp(-self.reach, self.reach) + self.reach]
            if self.causal:
                self.extended = self.extended.masked_fill(distance > 0, float("-inf"))

    def tokens_first(self, x: Tensor) -> Tensor:
        # PyTorch's fused kernel takes every stride but that of the last dimension.
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        return x if self.packed else x.transpose(1, 2)

    def caller_layout(self, x: Tensor) -> Tensor:
        return x if self.packed else x.transpose(1, 2)

    def reversed(self, x: Tensor) -> Tensor:
        return x.flip(0 if self.packed else 1) if self.reverse else x

    def parts(self, q: Tensor, k: Tensor) -> Iterator["Part"]:
        """Every (query block, visible keys) with at least one of each."""
        if self.packed:
            starts_q, starts_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()  # type: ignore[union-attr]
            for n, (q0, q1, k0, k1) in enumerate(zip(starts_q, starts_q[1:], starts_k, starts_k[1:])):
                if q1 > q0 and k1 > k0:
                    if self.reverse:
                        q0, q1 = q.shape[0] - q1, q.shape[0] - q0
                    yield from self._blocks(n, None, (q0, q1), (k0, k1), None, 0)
            return
        if q.shape[0] == 0 or q.shape[1] == 0 or k.shape[1] == 0:
            return
        if self.key_padding_mask is None or not self.reverse:
            holes = None if self.key_padding_mask is None else ~self.key_padding_mask[:, None, None, :]
            yield from self._blocks(0, slice(None), (0, q.shape[1]), (0, k.shape[1]), holes, 0)
            return
        for b, visible in enumerate(self.key_padding_mask):
            keys = visible.nonzero().flatten()
            if len(keys) == 0:
                continue
            k0, k1 = int(keys[0]), int(keys[-1]) + 1
            holes = None if k1 - k0 == len(keys) else ~visible[k0:k1]
            yield from self._blocks(b, slice(b, b + 1), (0, q.shape[1]), (k0, k1), holes, k0)

    def _blocks(
        self,
        n: int,
        batch: slice | None,
        queries: tuple[int, int],
        keys: tuple[int, int],
        holes: Tensor | None,
        k_start: int,
    ) -> Iterator["Part"]:
        """Splits causal documents into blocks of rows that stop at the diagonal; `k_start` is the position of the
        first key.
        """
        (q0, q1), (k0, k1) = queries, keys
        length_q, length_k = q1 - q0, k1 - k0
        if not self.causal:
            yield Part(self, n, batch, (q0, q1), (k0, k1), 0, k_start, holes)
            return
        # The first rows see nothing when keys start later than queries; they keep their zeros.
        for r0 in range(min(k_start, length_q), length_q, CAUSAL_BLOCK):
            r1 = min(r0 + CAUSAL_BLOCK, length_q)
            seen = min(length_k, r1 - k_start)
            block = (q1 - r1, q1 - r0) if self.reverse else (q0 + r0, q0 + r1)
            yield Part(
                self, n, batch, block, (k0, k0 + seen), r0, k_start, None if holes is None else holes[..., :seen]
            )

    def new_grad_bias(self) -> Tensor:
        if self.reverse:
            return torch.zeros(self.vector.shape[0], self.extended.shape[1])  # type: ignore[union-attr]
        return torch.zeros_like(self.dense, dtype=torch.float32, memory_format=torch.contiguous_format)  # type: ignore[arg-type]

    def fold_grad_bias(self, grad: Tensor) -> Tensor:
        """From one sum a distance to the shape of the bias: distances beyond the reach share its ends."""
        if not self.reverse:
            return grad.to(self.dense.dtype)  # type: ignore[union-attr]
        distance = torch.arange(1 - self.max_q, max(self.max_k, 1))
        index = distance.clamp(-self.reach, self.reach) + self.reach
        return torch.zeros_like(self.vector).index_add_(1, index, grad)  # type: ignore[arg-type]


class Part:
    """A block of queries of one document (or of the whole batch) and the keys it may see."""

    def __init__(
        self,
        walk: Walk,
        document: int,
        batch: slice | None,
        queries: tuple[int, int],
        keys: tuple[int, int],
        query_start: int,
        key_start: int,
        holes: Tensor | None,
    ) -> None:
        self.walk, self.document, self.batch, self.queries, self.keys = walk, document, batch, queries, keys
        self.query_start, self.key_start = query_start, key_start
        self.mask = self._mask(holes)

    def covers(self, q: Tensor) -> bool:
        """Whether this part is every row of a batch."""
        return self.batch == slice(None) and self.queries == (0, q.shape[1])

    def of_queries(self, x: Tensor) -> Tensor:
        """The (B, H, rows, D) view of this part's queries."""
        return self._view(x, *self.queries)

    def of_keys(self, x: Tensor) -> Tensor:
        """The (B, H, keys, D) view of this part's keys."""
        return self._view(x, *self.keys)

    def dropout(self, dropout_p: float, seed: Tensor | None) -> "kernels.Dropout | None":
        if seed is None:
            return None
        return kernels.Dropout(dropout_p, seed, self.document, self.query_start, self.key_start, self.walk.reverse)

    def grad_bias(self, grad: Tensor) -> Tensor:
        """The piece of the bias's gradient that this part adds to: distances (H, rows + keys - 1), or a dense block."""
        rows, columns = self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]
        if self.walk.reverse:
            return grad[:, self._shift() : self._shift() + rows + columns - 1]
        return self._dense_block(grad)

    def _view(self, x: Tensor, start: int, stop: int) -> Tensor:
        if self.batch is None:
            return x[start:stop].transpose(0, 1)[None]
        return x[self.batch, start:stop].transpose(1, 2)

    def _shift(self) -> int:
        """Index in the extended vector of the distance between the first key and the last query (the first in
        reverse).
        """
        rows = self.queries[1] - self.queries[0]
        return self.key_start - (self.query_start + rows - 1) + self.walk.max_q - 1

    def _mask(self, holes: Tensor | None) -> "kernels.Mask":
        rows, columns = self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]
        walk = self.walk
        added: Tensor | None = None
        if walk.reverse:
            extended = walk.extended
            head_stride = extended.stride(0) if extended.shape[0] > 1 else 0
            added = extended.as_strided((1, extended.shape[0], rows, columns), (0, head_stride, 1, 1), self._shift())
        elif walk.dense is not None:
            added = self._dense_block(walk.dense).float()
            if walk.causal:
                distance = torch.arange(columns)[None] + self.key_start - torch.arange(rows)[:, None] - self.query_start
                added = added.masked_fill(distance > 0, float("-inf"))
        if holes is not None:
            added = torch.zeros(1, 1, 1, columns) if added is None else added
            added = added.masked_fill(holes, float("-inf"))
        return kernels.Mask(added, walk.reverse, holes is not None)

    def _dense_block(self, dense: Tensor) -> Tensor:
        rows, columns = self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]
        if self.walk.packed:
            dense = dense[self.document][None] if dense.shape[0] > 1 else dense
        elif dense.shape[0] > 1:
            dense = dense[self.batch]
        if dense.shape[2] > 1:
            dense = dense[:, :, self.query_start : self.query_start + rows]
        if dense.shape[3] > 1:
            dense = dense[:, :, :, self.key_start : self.key_start + columns]
        return dense
