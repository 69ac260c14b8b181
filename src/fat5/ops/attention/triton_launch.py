"""Which tile, how many warps and how deep a pipeline each kernel runs with, by architecture, head dimension and element size.

`fat5 bench kernels --autotune` measures and rewrites launch_table.py on a machine with a GPU; `fat5 bench kernels --static`
proves for every row of it that nothing spills and everything fits.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from fat5.ops.attention.launch_table import TABLE

KERNELS = ("forward", "query_gradient", "key_gradient", "band", "dense_gradient")


class Launch(NamedTuple):
    """One kernel's launch configuration: M queries by N keys a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def configuration(kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> Launch:
    """The table's row for this device; an architecture that it does not know gets the row that fits everywhere."""
    return table_row(kernel, architecture(device), head_dim, dtype.itemsize)


def table_row(kernel: str, arch: int, head_dim: int, element_size: int) -> Launch:
    """`arch` is 10 * major + minor of the compute capability."""
    width = max(16, triton.next_power_of_2(head_dim))
    width = 64 if width < 64 else width
    return Launch(*TABLE[(kernel, known_architecture(arch), width, 4 if element_size > 2 else 2)])


def known_architecture(arch: int) -> int:
    """The architecture whose rows serve `arch`. sm_86's are the smallest: 99 KB of shared memory, mma.sync only."""
    if arch in (80, 86, 89, 90, 100):
        return arch
    if arch == 103:
        return 100
    return 80 if arch == 87 else 86


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> int:
    """10 * major + minor of the compute capability; 0 without CUDA (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def run(kernel: Any, programs: int | tuple[int, ...], arguments: tuple, constants: Mapping[str, Any], launch: Launch | None = None) -> None:
    """Launches a kernel over a grid; every kernel of this folder starts here, so that one hook sees them all."""
    grid = (programs,) if isinstance(programs, int) else programs
    if 0 in grid:
        return
    options = {} if launch is None else {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel[grid](*arguments, **constants, **options)
