"""Dropout on the CPU, where PyTorch draws one random number an entry, with one thread.

One draw of 64 bits serves four entries here: 16 bits decide about one, so the share of dropped entries is a multiple of
2^-16 (0.1 becomes 0.100006), and what is kept is scaled by exactly that share.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fat5.ops.choice import is_recorded

LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """`nn.Dropout`, quick on the CPU. Its random numbers come from the CPU's generator, but not the same ones.

    On other devices, in torch.compile and in exports it is `nn.Dropout`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape and floating dtype."""
        dropped = round(self.p * LEVELS)
        elsewhere = x.device.type != "cpu" or is_recorded() or torch.compiler.is_compiling()
        if elsewhere or self.inplace or not self.training or not 0 < dropped < LEVELS:
            return super().forward(x)
        kept: Tensor = _Dropout.apply(x, dropped)
        return kept


class _Dropout(torch.autograd.Function):
    """Keeps the mask in the dtype of x: products with it take half the time that `where` with truth values does.

    The scale is no part of the mask: bfloat16 would round 1/0.9 by 0.2%.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        mask = torch.empty(x.shape, dtype=x.dtype)
        torch.ge(draws.view(torch.int16)[: x.numel()].view(x.shape), dropped - LEVELS // 2, out=mask)
        ctx.save_for_backward(mask)
        ctx.scale = LEVELS / (LEVELS - dropped)
        return (x * mask).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (grads[0] * mask).mul_(ctx.scale), None
