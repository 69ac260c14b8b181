"""Which tile, how many warps and how deep a pipeline each kernel runs with, by architecture, head dimension and element
size.

`fat5 bench kernels --autotune` measures and rewrites launch_table.py on a machine with a GPU; `fat5 bench kernels
--static` proves for every row of it that nothing spills and everything fits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fat5.ops.attention.triton.launch_table import DEFAULTS, DROPOUT, TUNED

KERNELS = ("forward", "query_gradient", "key_gradient", "band", "dense_gradient")
ARCHITECTURES = (80, 86, 89, 90, 100)


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
    arguments: tuple
    constants: Mapping[str, Any]
    launch: Launch | None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch: compile-time constants and compiler options."""
        # Triton 3.10 no longer fuses multiplications and additions unless told to.
        options: dict[str, Any] = {"enable_fp_fusion": True}
        if self.launch is not None:
            options |= {"num_warps": self.launch.num_warps, "num_stages": self.launch.num_stages}
        return {**self.constants, **options}

    def run(self) -> None:
        """Launches the kernel (again)."""
        self.kernel[self.grid](*self.arguments, **self.options())


_overrides: dict[str, Launch] = {}
_recorder: list[Recorded] | None = None
_recorder_runs = False


_assumed_architecture: int | None = None


def configuration(
    kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype, dropout: bool = False
) -> Launch:
    """The table's row for this device."""
    arch = _assumed_architecture or architecture(device)
    return _overrides.get(kernel) or table_row(kernel, arch, head_dim, dtype.itemsize, dropout)


def table_row(kernel: str, arch: int, head_dim: int, element_size: int, dropout: bool = False) -> Launch:
    """`arch` is 10 * major + minor of the compute capability; one without rows of its own gets those that fit
    everywhere."""
    width, size = 64 if head_dim <= 64 else 128, 4 if element_size > 2 else 2
    if dropout:
        row = DROPOUT.get((kernel, arch, width, size)) or DROPOUT.get((kernel, 0, width, size))
        if row is not None:
            return Launch(*row)
    return Launch(*TUNED.get((kernel, arch, width, size), DEFAULTS[(kernel, width, size)]))


def band_configuration(
    device: torch.device, head_dim: int, dtype: torch.dtype, rows: Launch, masked: bool = False
) -> Launch:
    """The band kernel's row, its queries cut to lie evenly in a tile of the dQ pass (`rows`), its keys in its queries.

    Sides are powers of two, so the smaller divides the larger. `masked`: with dropout or a key mask.
    """
    band = configuration("band", device, head_dim, dtype, masked)
    block_m = min(band.block_m, rows.block_m)
    return band._replace(block_m=block_m, block_n=min(band.block_n, block_m))


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> int:
    """10 * major + minor of the compute capability; 0 without CUDA (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def run(
    kernel: Any,
    programs: int | tuple[int, ...],
    arguments: tuple,
    constants: Mapping[str, Any],
    launch: Launch | None = None,
) -> None:
    """Launches a kernel over a grid; every kernel of this folder starts here, so that one hook sees them all."""
    grid = (programs,) if isinstance(programs, int) else programs
    if 0 in grid:
        return
    recorded = Recorded(kernel, grid, arguments, constants, launch)
    if _recorder is not None:
        _recorder.append(recorded)
    if _recorder is None or _recorder_runs:
        recorded.run()


@contextmanager
def overridden(**launches: Launch) -> Iterator[None]:
    """Inside, the named kernels run with these configurations: for tests with small tiles, and for autotuning."""
    before = dict(_overrides)
    _overrides.update(launches)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@contextmanager
def assumed_architecture(arch: int) -> Iterator[None]:
    """Inside, the table's rows for `arch` are taken whatever the device: for compiling ahead of time."""
    global _assumed_architecture
    before, _assumed_architecture = _assumed_architecture, arch
    try:
        yield
    finally:
        _assumed_architecture = before


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
