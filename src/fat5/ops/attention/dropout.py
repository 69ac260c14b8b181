"""Counter-based dropout: the fate of an attention weight is a pure function of (seed, document, head, row, column).

Philox4x32-10 (Salmon et al., SC 2011), key = the two halves of a 64-bit seed, counter = (column, row, head,
document); the first output word w keeps the weight iff w >= p * 2^32. Row and column count inside the document
(inside the batch row in the padded layout), so that the mask is the same however documents are packed or padded, and
forward and backward can both draw it again.
"""

import torch
from torch import Tensor

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64 from the device's default generator, so that torch.manual_seed and checkpointing's RNG state govern
    it.
    """
    return torch.randint(0, 2**62, (1,), device=device, dtype=torch.int64)


def keep_mask(seed: Tensor, dropout_p: float, document: int, heads: int, rows: range, columns: range) -> Tensor:
    """(H, rows, columns) bool, True = the weight is kept (and is to be scaled by 1 / (1 - p))."""
    device = seed.device
    shape = (heads, len(rows), len(columns))
    c0 = torch.arange(columns.start, columns.stop, device=device)[None, None, :].expand(shape)
    c1 = torch.arange(rows.start, rows.stop, device=device)[None, :, None].expand(shape)
    c2 = torch.arange(heads, device=device)[:, None, None].expand(shape)
    c3 = torch.full((), document, device=device, dtype=torch.int64).expand(shape)
    word = philox(seed, c0, c1, c2, c3)
    return word >= int(dropout_p * 2**32)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """The first 32-bit word of Philox4x32-10, in int64 (products wrap, the two halves come out right)."""
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        first, second = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK32) ^ c1 ^ k0,
            second & _MASK32,
            ((first >> 32) & _MASK32) ^ c3 ^ k1,
            first & _MASK32,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK32, (k1 + _KEY_INCREMENTS[1]) & _MASK32
    return c0
