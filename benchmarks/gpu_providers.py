"""The forms of a fused operation that gpu_fused.py compares: plain PyTorch, the same compiled, our Triton kernels, and
Liger's where installed; and random inputs for them."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fat5.ops import use_kernels

TYPE, Z_LOSS = torch.bfloat16, 1e-4


def outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def normal(*shape: int, dtype: torch.dtype = TYPE) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(*shape) for shape in shapes]


def labelled(call: Callable, labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return call(hidden, weight, labels)


def candidates(call: Callable) -> dict[str, Callable]:
    return {"plain": plain(call), "compiled": plain(torch.compile(call, dynamic=False)), "triton": ours(call)}


def ours(call: Callable) -> Any:
    return partial(_under, "triton", call)


def plain(call: Callable) -> Any:
    return partial(_under, "plain", call)


def _under(setting: str, call: Callable, *inputs: Tensor) -> Any:
    use_kernels(setting)
    return call(*inputs)


def with_liger(
    providers: Any, name: str, labels: Tensor | None = None, angles: tuple[Tensor, ...] = ()
) -> dict[str, Callable]:
    """The providers, and Liger's of that name if it is installed."""
    found = providers if isinstance(providers, dict) else {"triton": providers}
    with suppress(ImportError):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction

        whole_angles = [torch.cat([part, part], dim=-1)[None] for part in angles]

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            arguments = (labels, None, None, -100, Z_LOSS, 0.0, "mean", None, False, torch.float32)
            return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, *arguments)[0]

        def turned(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            rows = [x[None].transpose(1, 2) for x in (q, k)]
            return tuple(x.transpose(1, 2)[0] for x in LigerRopeFunction.apply(*rows, *whole_angles))

        # Casting "gemma" is all in float32, as T5's; in_place=False leaves the upstream gradient as it is.
        liger = {
            "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "gemma", False),
            "geglu": LigerGELUMulFunction.apply,
            "rotary": turned,
            "linear_cross_entropy": loss,
        }
        found = {**found, "liger": liger[name]}
    return found
