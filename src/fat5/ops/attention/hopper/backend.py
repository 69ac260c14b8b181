"""The four functions of the Hopper backend, and where "auto" takes it. host.py needs flash-attn-4, so it is imported
late; torch.compile traces `unsupported`, `worthwhile` and `plan`.
"""

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.hopper.launch_table import (
    FASTER,
    FEWEST_TOKENS,
    HEAD_DIMS,
    HOPPER,
    MAX_REACH,
    SHORTEST,
    SMALLEST_MEAN,
    TOKENS_A_DOCUMENT,
)
from fat5.ops.triton.launch import architecture

PINNED = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.1", "quack-kernels": "0.6.5"}
"""What the hooks were proved with: they stand in the place of functions that no release promises to keep."""

logger = logging.getLogger(__name__)


def _missing() -> str | None:
    for name, wanted in PINNED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            return f"it needs {name} {wanted}, which is not installed: pip install 'fat5[hopper]'"
        if found != wanted:
            return f"it needs {name} {wanted}, {found} is installed: pip install 'fat5[hopper]'"
    return None


MISSING = _missing()
"""Why the packages cannot serve here, or None."""


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    q = call.q
    if not q.is_cuda:
        return f"it needs CUDA tensors, q is on {q.device}"
    if not _is_hopper(q.device):
        return "it needs a Hopper card (sm_90)"
    if MISSING is not None:
        return MISSING
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it serves float16 and bfloat16, q is {q.dtype}"
    if call.head_dim not in HEAD_DIMS:
        return f"it serves head dimensions 64 and 128, q has {call.head_dim}"
    for given, what in (
        (call.dense is not None, "no dense bias"),
        (call.key_padding_mask is not None, "no key padding mask"),
        (call.dropout_p > 0.0, "no dropout"),
    ):
        if given:
            return f"it serves {what}"
    if call.causal and not _has_equal_sides(call):
        # Its causal mask is aligned at the end of the keys, ours at their beginning.
        return "causal, it serves queries and keys of one length: packed, one tensor as cu_seqlens_q and cu_seqlens_k"
    if call.vector is not None and call.vector.requires_grad:
        if call.vector.shape[1] // 2 > MAX_REACH:
            return f"it serves learned biases of a reach up to {MAX_REACH}, this one has {call.vector.shape[1] // 2}"
        if call.packed and SMALLEST_MEAN * call.documents > call.k.shape[0]:
            return f"with a learned bias it serves documents of {SMALLEST_MEAN} tokens or more on average"
    return None


def worthwhile(call: AttentionCall, name: str = HOPPER) -> bool:
    """Whether "auto" takes the backend `name` of this folder where it can serve: the table names the faster one."""
    q, k = call.q, call.k
    fastest = FASTER.get((call.head_dim, call.vector is not None, call.causal, call.packed))
    if fastest != name or q.dtype != torch.bfloat16 or not (name == HOPPER or call.needs_grad) or not q.is_cuda:
        return False
    if call.dense is not None or call.key_padding_mask is not None or call.dropout_p > 0.0:
        return False
    if call.vector is not None and call.needs_grad and not call.vector.requires_grad:
        # The backward beside a bias that learns nothing was not measured.
        return False
    if call.packed:
        tokens = q.shape[0]
        long = min(tokens, k.shape[0]) >= TOKENS_A_DOCUMENT[call.vector is not None] * call.documents
    else:
        tokens = q.shape[0] * q.shape[2]
        long = q.shape[2] >= SHORTEST and k.shape[2] >= SHORTEST
    if not long or tokens < FEWEST_TOKENS or not _is_hopper(q.device):
        return False
    return MISSING is None or _tell(MISSING)


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    return architecture(device) == 90


@torch.compiler.assume_constant_result
def _tell(reason: str) -> bool:
    """Says once what is missing; False."""
    if reason not in _told:
        _told.add(reason)
        logger.warning("attention runs in Triton's kernels, Hopper's would be faster: %s", reason)
    return False


_told: set[str] = set()


def _has_equal_sides(call: AttentionCall) -> bool:
    return call.cu_seqlens_q is call.cu_seqlens_k if call.packed else call.q.shape[2] == call.k.shape[2]


def plan(call: AttentionCall) -> tuple[Tensor | None, ...]:
    """The padded bias, and the strips of keys whose sums of dS make its gradient."""
    from fat5.ops.attention.hopper import reduction

    return reduction.plan(call)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As op.py says."""
    from fat5.ops.attention.hopper import host

    return host.forward(*arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As op.py says."""
    from fat5.ops.attention.hopper import host

    return host.backward(*arguments)
