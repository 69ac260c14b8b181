"""The arithmetic of CPU attention for one part: PyTorch's fused kernel where it serves, row blocks of plain PyTorch elsewhere.

Shapes here: q, out, grad_out (B, H, Lq, D); k, v (B, H, Lk, D); lse (B, H, Lq); everything may be a strided view.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fat5.ops.attention.dropout import keep_mask

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Up to this many keys, plain matrix products that leave dS at hand beat the fused backward followed by a recomputation.
SHORT = 192
# Rows of one block of plain PyTorch; the blocks of the band must be small against the reach of the bias (91 for T5).
BLOCK = 128


@dataclass
class Mask:
    """What is added to the scores of a part.

    Args:
        added: broadcasts to (B, H, Lq, Lk); None adds nothing. A vector bias comes as the anti-diagonal view of cpu.py.
        reach: R of a vector bias; None when `added` is no such view.
        causal: whether `added` hides the future with -inf.
        zero: row + key at which the distance is 0, in a vector bias's view.
    """

    added: Tensor | None
    reach: int | None
    causal: bool
    zero: int


@dataclass
class Dropout:
    """Where in its document a part lies, so that its dropout mask can be drawn."""

    probability: float
    seed: Tensor
    document: int
    query_start: int
    key_start: int
    reverse: bool

    def scaled_keep(self, batch: int, heads: int, rows: range, total_rows: int, columns: int) -> Tensor:
        """(B, H, rows, columns) of 0 and 1 / (1 - p); `rows` as the part orders them."""
        if self.reverse:
            first = self.query_start + total_rows - rows.stop
        else:
            first = self.query_start + rows.start
        positions = range(first, first + len(rows))
        keys = range(self.key_start, self.key_start + columns)
        keep = torch.stack(
            [keep_mask(self.seed, self.probability, self.document + b, heads, positions, keys) for b in range(batch)]
        )
        return (keep.flip(2) if self.reverse else keep) / (1.0 - self.probability)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    """out (B, H, Lq, D) and lse (B, H, Lq)."""
    if dropout is None:
        added = _fit(mask.added, q, k)
        out, lse = _fused_forward(q, k, v, attn_mask=added, scale=scale)
        return out, lse
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:-1])
    for rows in _row_blocks(q.shape[2]):
        scores = _scores(q, k, mask, scale, rows)
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - _finite(lse[:, :, rows, None]))
        weights *= dropout.scaled_keep(q.shape[0], q.shape[1], range(rows.start, rows.stop), q.shape[2], k.shape[2])
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
    grad_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; adds the bias's to `grad_bias`, one sum a distance where the bias is a vector."""
    plain = dropout is not None or (grad_bias is not None and (mask.reach is None or k.shape[2] <= SHORT))
    if plain:
        return _plain_backward(grad_out, q, k, v, out, lse, mask, scale, dropout, grad_bias)
    grads = _fused_backward(
        grad_out, q, k, v, out, lse, 0.0, False, attn_mask=_fit(mask.added, q, k), scale=scale
    )  # fmt: skip
    if grad_bias is not None:
        _band(grad_out, q, k, v, out, lse, mask, scale, grad_bias)
    return grads


def _plain_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    dropout: Dropout | None,
    grad_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Five matrix products a block of rows, with dS at hand."""
    keys, values = k.float(), v.float()
    grad_q = torch.empty(q.shape)
    grad_k, grad_v = torch.zeros(k.shape), torch.zeros(v.shape)
    for rows in _row_blocks(q.shape[2]):
        grad_rows = grad_out[:, :, rows].float()
        weights = _scores(q, k, mask, scale, rows).sub_(_finite(lse[:, :, rows, None])).exp_()
        grad_scores = grad_rows @ values.transpose(-1, -2)
        delta = (grad_rows * out[:, :, rows].float()).sum(dim=-1, keepdim=True)
        if dropout is None:
            grad_v += weights.transpose(-1, -2) @ grad_rows
        else:
            keep = dropout.scaled_keep(q.shape[0], q.shape[1], range(rows.start, rows.stop), q.shape[2], k.shape[2])
            grad_v += (weights * keep).transpose(-1, -2) @ grad_rows
            grad_scores *= keep
        grad_scores.sub_(delta).mul_(weights)
        if grad_bias is not None:
            _add_grad_bias(grad_bias, grad_scores, mask, rows)
        grad_q[:, :, rows] = scale * (grad_scores @ keys)
        grad_k += scale * (grad_scores.transpose(-1, -2) @ q[:, :, rows].float())
    return grad_q, grad_k, grad_v


def _add_grad_bias(grad_bias: Tensor, grad_scores: Tensor, mask: Mask, rows: slice) -> None:
    if grad_bias.dim() == 2:
        sums = _antidiagonal_sums(grad_scores.sum(dim=0))
        grad_bias[:, rows.start : rows.start + sums.shape[1]] += sums
        return
    target = grad_bias[:, :, rows] if grad_bias.shape[2] > 1 else grad_bias
    target += grad_scores.sum_to_size(target.shape)


def _band(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float, grad_bias: Tensor
) -> None:
    """The gradient of a vector bias: from the scores computed again near the diagonal, and one sum for each far side.

    Rows are in reverse order, so that row i' and key j stand at index i' + j of `grad_bias` (H, Lq + Lk - 1).
    """
    reach = mask.reach or 0
    delta = (grad_out.float() * out.float()).sum(dim=-1)
    heads = q.shape[1]
    total, left, right = torch.zeros(heads), False, False
    for rows in _row_blocks(q.shape[2]):
        # Keys before `low` are at distance -R or less from every row of the block, keys from `high` at R or more.
        low = min(max(mask.zero - (rows.stop - 1) - reach + 1, 0), k.shape[2])
        high = min(max(mask.zero - rows.start + reach, low), k.shape[2])
        left, right = left or low > 0, right or (high < k.shape[2] and not mask.causal)
        if high > low:
            near = slice(low, high)
            weights = _scores(q, k, mask, scale, rows, near).sub_(lse[:, :, rows, None]).exp_()
            tile = grad_out[:, :, rows].float() @ v[:, :, near].float().transpose(-1, -2)
            tile.sub_(delta[:, :, rows, None]).mul_(weights)
            sums = _antidiagonal_sums(tile.sum(dim=0))
            grad_bias[:, rows.start + low : rows.start + low + sums.shape[1]] += sums
            total += sums.sum(dim=1)
    # Every row of dS sums to zero, so one far side comes for nothing; the other needs its partial attention.
    if left and right:
        far = _far_left(grad_out, q, k, v, lse, delta, mask, scale, reach)
        grad_bias[:, 0] += far
        total += far
    if left or right:
        grad_bias[:, -1 if right else 0] -= total


def _far_left(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, mask: Mask, scale: float, reach: int
) -> Tensor:
    """The sum of dS over the keys that `_band` leaves out on the left, (H,).

    There the bias is one number a head, so that the share of those keys in a row's attention and their own output follow
    from an attention without a mask: sum dS = share * (grad_out . partial output - delta).
    """
    assert mask.added is not None
    bias = mask.added[0, :, 0, 0]
    far = torch.zeros(q.shape[1])
    for rows in _row_blocks(q.shape[2]):
        low = min(max(mask.zero - (rows.stop - 1) - reach + 1, 0), k.shape[2])
        if low > 0:
            partial, partial_lse = _fused_forward(q[:, :, rows], k[:, :, :low], v[:, :, :low], scale=scale)
            share = torch.exp(partial_lse + bias[:, None] - lse[:, :, rows])
            along = (grad_out[:, :, rows].float() * partial.float()).sum(dim=-1)
            far += (share * (along - delta[:, :, rows])).sum(dim=(0, 2))
    return far


def _antidiagonal_sums(tile: Tensor) -> Tensor:
    """(H, m, w) to (H, m + w - 1): entry c sums all (i, j) with i + j = c."""
    heads, m, w = tile.shape
    skewed = torch.zeros(heads, m, w + m)
    skewed[:, :, :w] = tile
    return skewed.view(heads, -1)[:, : m * (w + m - 1)].view(heads, m, w + m - 1).sum(dim=1)


def _row_blocks(length: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _scores(q: Tensor, k: Tensor, mask: Mask, scale: float, rows: slice, keys: slice = slice(None)) -> Tensor:
    """scale * q k^T + added for a block of rows and keys, float32."""
    scores = q[:, :, rows].float() @ k[:, :, keys].float().transpose(-1, -2)
    if scale != 1.0:
        scores *= scale
    if mask.added is not None:
        added = mask.added[:, :, rows] if mask.added.shape[2] > 1 else mask.added
        scores += added[:, :, :, keys] if added.shape[3] > 1 else added
    return scores


def _finite(lse: Tensor) -> Tensor:
    """-inf (a row that sees nothing) to 0, so that exp(-inf - lse) is 0 and not NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _fit(added: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if added is None:
        return None
    return added.expand(-1, -1, q.shape[2], k.shape[2])
