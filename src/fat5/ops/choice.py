"""One switch for the fused operations: plain PyTorch (which torch.compile fuses) or our Triton kernels.

    FAT5_KERNELS=auto                      Triton on CUDA, unless torch.compile does as well; plain PyTorch elsewhere
    FAT5_KERNELS=triton | plain            for all operations
    FAT5_KERNELS=geglu=triton,rms_norm=plain   for these; the others follow auto

`use_kernels` does the same from Python. Attention has a `backend` argument instead.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from fat5.errors import ConfigurationError

# What "auto" means on a CUDA device inside torch.compile, where Inductor fuses the plain forms: "triton" only where the
# kernel is faster (benchmarks/gpu_fused.py) or saves memory. Outside torch.compile nothing fuses the plain forms, and
# every kernel is faster: docs/decisions/0060-one-switch-for-fused-kernels.md.
COMPILED_ON_CUDA = {
    "rms_norm": "plain",
    "geglu": "plain",
    "geglu_joined": "triton",
    "rotary": "plain",
    "linear_cross_entropy": "triton",
    "adamw_scale": "triton",
    "decoding": "triton",
}
CHOICES = ("auto", "plain", "triton")

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_INSTALLED = find_spec("triton") is not None
_wanted: dict[str, str] = {}
_setting = "auto"


def use_kernels(setting: str) -> str:
    """Chooses the implementation of the fused operations from now on; returns the previous setting.

    Args:
        setting: "auto", "plain" or "triton", or a list such as "geglu=triton,rms_norm=plain" (module docstring).

    Raises:
        ConfigurationError: no such operation or choice.
    """
    global _setting
    wanted: dict[str, str] = {}
    for part in setting.split(","):
        name, equals, choice = part.strip().rpartition("=")
        names = [name] if equals else list(COMPILED_ON_CUDA)
        if choice not in CHOICES or not set(names) <= set(COMPILED_ON_CUDA):
            raise ConfigurationError(
                f"{part.strip()!r} is no choice of kernels",
                where="FAT5_KERNELS",
                hint=f"Say {', '.join(CHOICES)}, or OPERATION=CHOICE of {', '.join(COMPILED_ON_CUDA)}",
            )
        wanted |= dict.fromkeys(names, choice)
    before, _setting = _setting, setting
    _wanted.clear()
    _wanted.update(wanted)
    return before


def uses_triton(operation: str, *tensors: Tensor) -> bool:
    """Whether a call of `operation` on these tensors goes to its Triton kernel.

    Raises:
        ConfigurationError: Triton was asked for, and cannot serve these tensors.
    """
    wanted = _wanted.get(operation, "auto")
    if wanted == "auto":
        compiled = torch.compiler.is_compiling() and COMPILED_ON_CUDA[operation] == "plain"
        wanted = "plain" if compiled or not tensors[0].is_cuda else "auto"
    if wanted == "plain":
        return False
    reason = unsupported(*tensors)
    if reason and wanted == "triton":
        raise ConfigurationError(
            f"{operation} was asked for as a Triton kernel: {reason}", where="FAT5_KERNELS", hint="Say auto"
        )
    return not reason


def is_recorded() -> bool:
    """Whether a graph is being recorded that other batches and other programs run (torch.export, torch.jit.trace).

    It must not depend on the values of a mask or on a length, and can hold PyTorch's own operations only.
    """
    # torch.compiler.is_exporting() is this flag, but PyTorch 2.11 answers True in every function it compiles.
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def unsupported(*tensors: Tensor) -> str:
    """Why the kernels cannot serve these tensors, or nothing."""
    if not _TRITON_INSTALLED:
        return "the triton package is not installed"
    for x in tensors:
        if not x.is_cuda and not _INTERPRETED:
            return f"it needs CUDA tensors (or TRITON_INTERPRET=1), got one on {x.device}"
        if x.device != tensors[0].device:
            return f"it needs tensors on one device, got {tensors[0].device} and {x.device}"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it serves float32, bfloat16 and float16, got {x.dtype}"
    return ""


use_kernels(os.environ.get("FAT5_KERNELS", "auto"))
