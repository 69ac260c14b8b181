"""Which tile, how many warps and how deep a pipeline each attention kernel runs with, by architecture, head dimension
and element size: the rows of launch_table.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fat5.ops.attention.triton.launch_table import DEFAULTS, DROPOUT, TUNED
from fat5.ops.triton.launch import Launch, architecture

KERNELS = ("forward", "query_gradient", "key_gradient", "band", "dense_gradient")
ARCHITECTURES = (80, 86, 89, 90, 100)

_overrides: dict[str, Launch] = {}
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
