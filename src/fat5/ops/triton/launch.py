"""How a kernel is launched: by one function, so that one hook sees every launch, to record it or to run it again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One kernel's launch configuration: M queries by N keys a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Recorded(NamedTuple):
    """One kernel launch, ready to be compiled or run again."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    launch: Launch | None

    @property
    def name(self) -> str:
        """Of the kernel, without `_kernel`."""
        return self.kernel.fn.__name__.removesuffix("_kernel")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch: compile-time constants and compiler options."""
        # Triton 3.10 no longer fuses multiplications and additions unless told to.
        options: dict[str, Any] = {"enable_fp_fusion": True}
        if self.launch is not None:
            options |= {"num_warps": self.launch.num_warps, "num_stages": self.launch.num_stages}
        return {**self.constants, **options}

    def run(self) -> None:
        """Launches the kernel (again)."""
        self.kernel[self.grid](**self.arguments, **self.options())


_recorder: list[Recorded] | None = None
_recorder_runs = False
_assumed_architecture: int | None = None


def architecture(device: torch.device) -> int:
    """10 * major + minor of the compute capability; 0 without CUDA (the interpreter)."""
    return _assumed_architecture or _capability(device)


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def run(
    kernel: Any,
    programs: int | tuple[int, ...],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    launch: Launch | None = None,
) -> None:
    """Launches a kernel over a grid. `arguments` and `constants` (compile-time) go by the names of its parameters."""
    grid = (programs,) if isinstance(programs, int) else programs
    if 0 in grid:
        return
    recorded = Recorded(kernel, grid, arguments, constants, launch)
    if _recorder is not None:
        _recorder.append(recorded)
    if _recorder is None or _recorder_runs:
        recorded.run()


def as_rows(x: Tensor) -> Tensor:
    """(rows, columns) with unit stride along columns: a view where x's strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@contextmanager
def recording(run: bool = False) -> Iterator[list[Recorded]]:
    """Inside, kernels are listed; unless they also `run`, outputs stay as they were allocated."""
    global _recorder, _recorder_runs
    before = _recorder, _recorder_runs
    _recorder, _recorder_runs = [], run
    try:
        yield _recorder
    finally:
        _recorder, _recorder_runs = before


@contextmanager
def assumed_architecture(arch: int) -> Iterator[None]:
    """Inside, kernels are launched as on `arch`, whatever the device: for compiling ahead of time."""
    global _assumed_architecture
    before, _assumed_architecture = _assumed_architecture, arch
    try:
        yield
    finally:
        _assumed_architecture = before
