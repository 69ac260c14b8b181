"""Rows of a table, with a gradient that is the same at every run.

torch.compile turns the gradient of `nn.Embedding` into atomic additions, whose order (and so whose rounding) changes
from run to run. PyTorch's own kernel sorts the ids first and adds in their order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fat5.ops.choice import is_recorded


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids].

    Args:
        ids: (...) int64, each in [0, V).
        weight: (V, d) floating point.

    Returns:
        (..., d), of weight's dtype. Equal inputs give an equal gradient, compiled or not.
    """
    if torch.compiler.is_compiling() and not is_recorded() and torch.is_grad_enabled() and weight.requires_grad:
        return _Embedding.apply(ids, weight)
    return F.embedding(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, _embedding_gradient(grads[0], ids, ctx.rows)


@torch.library.custom_op("fat5::embedding_gradient", mutates_args=())
def _embedding_gradient(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """(rows, d): the sum of the gradients of each id. An operator of its own, which torch.compile leaves as it is."""
    return torch.ops.aten.embedding_dense_backward(grad, ids, rows, -1, False)


@_embedding_gradient.register_fake
def _(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[-1])
