"""Dropout on the CPU, where PyTorch draws one random number an entry, with one thread.

One draw of 64 bits serves four entries here: 16 bits decide about one, so the share of dropped entries is a multiple of
2^-16 (0.1 becomes 0.100006), and what is kept is scaled by exactly that share.
"""

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
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        kept = (draws.view(torch.int16)[: x.numel()] >= dropped - LEVELS // 2).view(x.shape)
        return torch.where(kept, x, 0.0) * (LEVELS / (LEVELS - dropped))
