"""One call of attention, as `api.attention` validated it: what every backend is handed."""

from typing import NamedTuple

import torch
from torch import Tensor

from fat5.ops.attention.bias import RelativeBias

TENSORS = 9
"""The first fields of an `AttentionCall` are tensors, the others numbers."""


class AttentionCall(NamedTuple):
    """The arguments of `fat5.ops.attention`; shapes and meanings are documented there.

    The operators of op.py take these fields one by one, in this order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    vector: Tensor | None
    """The vector of a `RelativeBias`; float32 when a registered backend receives it."""
    dense: Tensor | None
    """A dense bias of four dimensions."""
    key_padding_mask: Tensor | None
    seed: Tensor | None
    """(1,) int64, None without dropout."""
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    causal: bool
    scale: float
    """Above zero when a registered backend receives it."""
    dropout_p: float

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def documents(self) -> int:
        """Packed documents, or batch rows."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def dropout(self) -> bool:
        return self.seed is not None and self.dropout_p > 0.0

    @property
    def needs_grad(self) -> bool:
        """Whether autograd will ask for a backward."""
        inputs = (self.q, self.k, self.v, self.vector, self.dense)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def dense_bias(self) -> Tensor | None:
        """The bias of a padded call as a tensor that broadcasts to (B, H, Lq, Lk)."""
        if self.vector is None:
            return self.dense
        return RelativeBias(self.vector).dense(self.q.shape[-2], self.k.shape[-2])

    def document(self, n: int, rows_q: slice, rows_k: slice) -> "AttentionCall":
        """Document n of a packed call, in the rows given, as a padded call of one batch row."""
        q, k, v = (x[rows].transpose(0, 1)[None] for x, rows in ((self.q, rows_q), (self.k, rows_k), (self.v, rows_k)))
        dense = self.dense
        if dense is not None:
            dense = dense[n if dense.shape[0] > 1 else 0][None, :, : q.shape[2], : k.shape[2]]
        return self._replace(q=q, k=k, v=v, dense=dense, cu_seqlens_q=None, cu_seqlens_k=None)

    def empty_like(self, x: Tensor) -> Tensor:
        """Of x's shape and dtype, tokens before heads in memory: the layout of outputs and gradients."""
        order = (0, 1, 2) if self.packed else (0, 2, 1, 3)
        return torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device)

    def empty_lse(self) -> Tensor:
        """The log-sum-exp of every query's scores: float32, natural logarithm; (H, Tq) packed, (B, H, Lq) padded."""
        shape = self.q.shape[:3] if self.cu_seqlens_q is None else (self.q.shape[1], self.q.shape[0])
        return self.q.new_empty(shape, dtype=torch.float32)
