"""The arithmetic of CPU attention for one part: PyTorch's fused kernel where it serves, tiles of plain PyTorch
elsewhere.

Shapes here: q, out, grad_out (B, H, Lq, D); k, v (B, H, Lk, D); lse (B, H, Lq); everything may be a strided view.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fat5.ops.attention.dropout import keep_mask

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Rows and keys of one tile of the plain backward: with 8 heads its three buffers fit a core's share of the
# last-level cache.
TILE_ROWS, TILE_KEYS = 128, 512
KEPT_SHAPES = 8
LOG2_E = 1.0 / math.log(2.0)


@dataclass
class Mask:
    """What is added to the scores of a part.

    Args:
        added: broadcasts to (B, H, Lq, Lk); None adds nothing.
        antidiagonal: whether `added` is a vector bias, constant where row + key is (rows are in reverse order). Only
            other masks, and those with holes, may leave a row with nothing to see.
        holes: whether keys are left out by the caller.
    """

    added: Tensor | None
    antidiagonal: bool
    holes: bool


@dataclass
class Dropout:
    """Where in its document a part lies, so that its dropout mask can be drawn."""

    probability: float
    seed: Tensor
    document: int
    query_start: int
    key_start: int
    reverse: bool

    def scaled_keep(self, batch: int, heads: int, rows: range, total_rows: int, keys: range) -> Tensor:
        """(H, rows, keys) of 0 and 1 / (1 - p) for one batch row; `rows` of `total_rows`, in the order of the part."""
        first = self.query_start + (total_rows - rows.stop if self.reverse else rows.start)
        positions = range(first, first + len(rows))
        columns = range(self.key_start + keys.start, self.key_start + keys.stop)
        keep = keep_mask(self.seed, self.probability, self.document + batch, heads, positions, columns)
        return (keep.flip(1) if self.reverse else keep) / (1.0 - self.probability)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """out (B, H, Lq, D) and lse (B, H, Lq)."""
    if dropout is None:
        added = _fit(mask.added, q, k)
        out, lse = _fused_forward(q, k, v, attn_mask=added, scale=scale)
        if mask.added is not None and (mask.holes or not mask.antidiagonal):
            # The fused kernel gives lse = 0 to a row that sees nothing.
            lse = lse.masked_fill((mask.added == float("-inf")).all(dim=-1), float("-inf"))
        return out, lse
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:-1])
    for rows in _row_blocks(q.shape[2]):
        scores = _scores(q, k, mask, scale, rows)
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - _finite(lse[:, :, rows, None]))
        for b in range(q.shape[0]):
            block = range(rows.start, rows.stop)
            weights[b] *= dropout.scaled_keep(b, q.shape[1], block, q.shape[2], range(k.shape[2]))
        out[:, :, rows] = (weights @ v.float()).to(out.dtype)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    dropout: Dropout | None,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_bias: Tensor | None,
    buffers: "Buffers",
) -> None:
    """Adds the gradients of q, k and v to `grads`, and the bias's to `grad_bias`, one sum a distance for a vector."""
    if dropout is None and grad_bias is None:
        # A row that sees nothing has lse = -inf; exp(-inf - 0) is what it needs.
        found = _fused_backward(
            grad_out, q, k, v, out, _finite(lse), 0.0, False, attn_mask=_fit(mask.added, q, k), scale=scale
        )
        for grad, part in zip(grads, found):
            grad += part
        return
    # Rows of at most one tile of keys take delta from themselves.
    long = k.shape[2] > TILE_KEYS
    delta = (grad_out.float() * out.float()).sum(dim=-1) if long else lse
    # Scores in base 2: exp2 costs half of exp, and the scale rides along.
    lse = lse * LOG2_E
    for b in range(q.shape[0]):
        query, key, value = q[b].float() * (scale * LOG2_E), k[b].float(), v[b].float()
        added = None if mask.added is None else mask.added[b if mask.added.shape[0] > 1 else 0]
        target = grad_bias
        if grad_bias is not None and not mask.antidiagonal:
            target = grad_bias[b if grad_bias.shape[0] > 1 else 0]
        totals = [grad[b] for grad in grads]
        if q.dtype != torch.float32:
            totals = [torch.zeros(grad.shape) for grad in totals]
        _tiles(
            grad_out[b].float(), query, key, value, lse[b], delta[b], added, scale, dropout, b, totals, target,
            mask.antidiagonal, buffers,
        )  # fmt: skip
        if q.dtype != torch.float32:
            for grad, total in zip(grads, totals):
                grad[b] += total


class Buffers:
    """Scratch memory of one backward call, kept from tile to tile: fresh memory costs more to map than to fill."""

    def __init__(self) -> None:
        self.flat = torch.empty(2, 0)
        self.skewed: dict[tuple[int, int, int], Tensor] = {}

    def of(self, heads: int, m: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
        """Two (heads, m, w) of anything, and heads * m * (m + w) flat zeros to hold dS with its rows m + w apart.

        Read with rows m + w - 1 apart, row i of dS is moved by i, and its anti-diagonals stand in columns.
        """
        size = heads * m * w
        if self.flat.shape[1] < size:
            self.flat = torch.empty(2, size)
        if (heads, m, w) not in self.skewed:
            if len(self.skewed) >= KEPT_SHAPES:
                self.skewed.clear()
            self.skewed[heads, m, w] = torch.zeros(heads * m * (m + w))
        first, second = (self.flat[i, :size].view(heads, m, w) for i in range(2))
        return first, second, self.skewed[heads, m, w]


def _tiles(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    added: Tensor | None,
    scale: float,
    dropout: Dropout | None,
    batch: int,
    grads: list[Tensor],
    grad_bias: Tensor | None,
    antidiagonal: bool,
    buffers: "Buffers",
) -> None:
    """One document tile by tile: five batched matrix products each, and dS at hand for the bias.

    Shapes without batch: (H, Lq, D), (H, Lk, D), (H, Lq); q and lse in base 2. Adds to `grads` and to `grad_bias`,
    which is (H, Lq + Lk - 1), entry i + j for row i and key j, or of the dense bias's shape.
    """
    heads, rows_total, keys_total = q.shape[0], q.shape[1], k.shape[1]
    grad_q, grad_k, grad_v = grads
    for r0 in range(0, rows_total, TILE_ROWS):
        rows = slice(r0, min(r0 + TILE_ROWS, rows_total))
        for c0 in range(0, keys_total, TILE_KEYS):
            keys = slice(c0, min(c0 + TILE_KEYS, keys_total))
            m, w = rows.stop - r0, keys.stop - c0
            weights_buffer, products_buffer, skewed = buffers.of(heads, m, w)
            weights = torch.bmm(q[:, rows], k[:, keys].transpose(1, 2), out=weights_buffer)
            _softmax_(
                weights, None if added is None else _block(added, rows, keys), lse[:, rows, None], w == keys_total
            )
            products = torch.bmm(grad_out[:, rows], v[:, keys].transpose(1, 2), out=products_buffer)
            grad_scores = skewed.view(heads, m, m + w)[:, :, :w]
            if dropout is not None:
                keep = dropout.scaled_keep(batch, heads, range(r0, rows.stop), rows_total, range(c0, keys.stop))
                grad_v[:, keys].baddbmm_((weights * keep).transpose(1, 2), grad_out[:, rows])
                products.mul_(keep)
            else:
                grad_v[:, keys].baddbmm_(weights.transpose(1, 2), grad_out[:, rows])
            torch.mul(products, weights, out=grad_scores)
            # delta = rowsum(P dP): from the row itself where it is whole, so that dS sums to zero as exactly as it can.
            row_delta = grad_scores.sum(dim=-1, keepdim=True) if w == keys_total else delta[:, rows, None]
            grad_scores.addcmul_(weights, row_delta, value=-1.0)
            grad_q[:, rows].baddbmm_(grad_scores, k[:, keys], alpha=scale)
            grad_k[:, keys].baddbmm_(grad_scores.transpose(1, 2), q[:, rows], alpha=1.0 / LOG2_E)
            if grad_bias is not None and antidiagonal:
                sums = skewed.view(heads, -1)[:, : m * (m + w - 1)].view(heads, m, m + w - 1).sum(dim=1)
                grad_bias[:, r0 + c0 : r0 + c0 + m + w - 1] += sums
            elif grad_bias is not None:
                target = _block(grad_bias, rows, keys)
                target += grad_scores.sum_to_size(target.shape)


def _softmax_(scores: Tensor, added: Tensor | None, lse: Tensor, whole: bool) -> None:
    """Scores (base 2) to attention weights in place; `whole` when every key of the rows is there.

    Whole rows are normalised by their own sum, which is exact where the rounding of the stored log-sum-exp is not.
    Parts of rows have only that: exp2 costs half of exp, which is why scores come in base 2.
    """
    if not whole:
        if added is not None:
            scores.add_(added, alpha=LOG2_E)
        scores.sub_(_finite(lse)).exp2_()
        return
    scores.mul_(1.0 / LOG2_E)
    if added is not None:
        scores.add_(added)
    torch.softmax(scores, dim=-1, out=scores)
    blind = lse == float("-inf")
    if blind.any():
        scores.masked_fill_(blind, 0.0)  # a row that sees nothing: its softmax is NaN


def _block(x: Tensor, rows: slice, keys: slice) -> Tensor:
    """The tile of a tensor that broadcasts to (H, Lq, Lk)."""
    x = x[:, rows] if x.shape[1] > 1 else x
    return x[:, :, keys] if x.shape[2] > 1 else x


def _row_blocks(length: int) -> list[slice]:
    return [slice(start, min(start + TILE_ROWS, length)) for start in range(0, length, TILE_ROWS)]


def _scores(q: Tensor, k: Tensor, mask: Mask, scale: float, rows: slice) -> Tensor:
    """scale * q k^T + added for a block of rows, float32."""
    scores = scale * (q[:, :, rows].float() @ k.float().transpose(-1, -2))
    if mask.added is not None:
        scores += mask.added[:, :, rows] if mask.added.shape[2] > 1 else mask.added
    return scores


def _finite(lse: Tensor) -> Tensor:
    """-inf (a row that sees nothing) to 0, so that exp(-inf - lse) is 0 and not NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _fit(added: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if added is None:
        return None
    return added.expand(-1, -1, q.shape[2], k.shape[2])
