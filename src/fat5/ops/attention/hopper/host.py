"""How the Hopper backend calls flash-attn-4, and turns what its hooks leave into the gradient of the bias."""

import hashlib
import importlib.util
import sys
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from flash_attn.cute import interface
from torch import Tensor

from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.hopper import hooks, reduction
from fat5.ops.attention.hopper.launch_table import FORWARD_TILES

DETERMINISTIC = True
"""Whether dQ is added up in one order. Without it the backward is about 15% faster, and equal to the bit no more."""


def forward(call: AttentionCall, plan: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp."""
    out, lse = call.empty_like(call.q), call.empty_lse()
    if _is_empty(call):
        return out.zero_(), lse.fill_(float("-inf"))
    table = plan[0]
    flash = interface if table is None else copy_with(learning=False)
    hooked: dict[str, Any] = {}
    if table is not None:
        tile = FORWARD_TILES.get((call.head_dim, call.causal, call.packed))
        hooked = {"score_mod": _score(call), "aux_tensors": [table], "tile_mn": tile}
    rows = [_rows(call, x) for x in (call.q, call.k, call.v)]
    flash._flash_attn_fwd(*rows, **_how(call), **hooked, out=_rows(call, out), lse=lse)
    if call.cu_seqlens_q is not None:
        reduction.clear_rows_of_no_document(call.cu_seqlens_q, out)
    return out, lse


def backward(
    call: AttentionCall,
    plan: tuple[Tensor | None, ...],
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of the bias in its own shape (None unless asked for)."""
    table, strips = plan[:2]
    grads = [call.empty_like(x) for x in (call.q, call.k, call.v)]
    grad_vector = torch.zeros_like(call.vector) if call.vector is not None and bias_needs_grad else None
    if _is_empty(call):
        return *(grad.zero_() for grad in grads), grad_vector  # type: ignore[return-value]
    sums = reduction.buffers(call) if table is not None and bias_needs_grad else None
    flash, hooked = interface, {}
    if table is not None:
        flash = copy_with(learning=sums is not None)
        hooked = {
            "score_mod": _score(call), "score_mod_bwd": hooks.score_gradient, "aux_tensors": [table, *(sums or ())]
        }  # fmt: skip
    rows = [_rows(call, x) for x in (call.q, call.k, call.v, out, grad_out)]
    into = {name: _rows(call, x) for name, x in zip(("dq", "dk", "dv"), grads)}
    flash._flash_attn_bwd(*rows, lse, **_how(call), **hooked, **into, deterministic=DETERMINISTIC)
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        reduction.clear_rows_of_no_document(call.cu_seqlens_q, grads[0])
        reduction.clear_rows_of_no_document(call.cu_seqlens_k, *grads[1:])
    if sums is not None:
        grad_vector = reduction.vector_gradient(call, strips, *sums)
    return *grads, grad_vector  # type: ignore[return-value]


def _score(call: AttentionCall) -> Any:
    return hooks.score if call.scale == 1.0 else hooks.scaled_score


def _is_empty(call: AttentionCall) -> bool:
    return not (call.q.numel() and call.k.numel() and call.documents)


def _how(call: AttentionCall) -> dict[str, Any]:
    return {
        "cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k, "softmax_scale": call.scale,
        "causal": call.causal,
    }  # fmt: skip


def _rows(call: AttentionCall, x: Tensor) -> Tensor:
    """(tokens, heads, head_dim), or (batch, length, heads, head_dim): the package's layout."""
    return x if call.packed else x.transpose(1, 2)


@lru_cache(maxsize=2)
def copy_with(learning: bool) -> ModuleType:
    """The interface with the relative bias; `learning`: whose backward also leaves the sums of dS by distance.

    It is a module of functions that read the kernel classes and the tile sizes from its globals, and keep what they
    compiled. Each copy is that same file loaded once more under a name of our own, so that another user of the package
    in this process meets its own module, untouched.
    """
    name = f"{__name__}_{'learning' if learning else 'biased'}"
    assert interface.__file__ is not None
    spec = importlib.util.spec_from_file_location(name, interface.__file__)
    assert isinstance(spec, ModuleSpec)
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    names = vars(module)
    # Their compilations are kept once for all.
    names |= {same: getattr(interface, same) for same in ("_bwd_preprocess", "_bwd_postprocess_convert")}
    names["FlashAttentionForwardSm90"] = hooks.BiasedForward
    names["FlashAttentionBackwardSm90"] = hooks.LearningBackward if learning else hooks.BiasedBackward
    sizes = module._tile_size_bwd_sm90
    # The sizes of causal calls leave registers for the bias and its sums at D 128; at D 64 they are the same.
    names["_tile_size_bwd_sm90"] = lambda head_dim, head_dim_v, _causal, *more, **named: sizes(
        head_dim, head_dim_v, True, *more, **named
    )
    return module


# What is compiled depends on all of hooks.py; the package would take the hash of the function it is given, and keeps
# compilations on disk by it when told to.
assert hooks.__file__ is not None
_SOURCE = hashlib.sha256(Path(hooks.__file__).read_bytes()).hexdigest()
for _hook in (hooks.score, hooks.scaled_score, hooks.score_gradient):
    _hook.__cute_hash__ = f"fat5 {_hook.__name__} {_SOURCE}"
