"""The four functions of the Triton backend. host.py needs the triton package, so it is imported late.

The imports are statements and not `import_module`, because torch.compile traces `plan`.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fat5.ops.attention.call import AttentionCall

MAX_HEAD_DIM = 128
_INSTALLED = find_spec("triton") is not None


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    q = call.q
    if not _INSTALLED:
        return "it needs the triton package, which is not installed: pip install 'fat5[gpu]'"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), q is on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it serves float16, bfloat16 and float32, q is {q.dtype}"
    if not 1 <= call.head_dim <= MAX_HEAD_DIM:
        return f"it serves head dimensions 1 to {MAX_HEAD_DIM}, q has {call.head_dim}"
    return None


def plan(call: AttentionCall) -> tuple[Tensor | None, ...]:
    """The padded bias, and the work lists of the forward, dQ, dK/dV and band kernels."""
    from fat5.ops.attention.triton import host

    return host.plan(call)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As op.py says."""
    from fat5.ops.attention.triton import host

    return host.forward(*arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As op.py says."""
    from fat5.ops.attention.triton import host

    return host.backward(*arguments)
