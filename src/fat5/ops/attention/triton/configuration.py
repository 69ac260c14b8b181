"""Which tile, how many warps and how deep a pipeline each attention kernel runs with, by architecture, head dimension
and element size: the rows of launch_table.py, and over them those that `fat5 bench kernels --autotune` found here.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fat5.files import is_count, parse_json
from fat5.ops.attention.triton.launch_table import DEFAULTS, DENSE, DROPOUT, TUNED, Row
from fat5.ops.triton.launch import Launch, architecture

KERNELS = ("forward", "query_gradient", "key_gradient", "band", "dense_gradient")
ARCHITECTURES = (80, 86, 89, 90, 100)
KEY, ROW = ("kernel", "architecture", "head_dim", "element_size"), Launch._fields
"""The fields of a row of the user's table, which is a JSON list of objects."""

logger = logging.getLogger(__name__)

_overrides: dict[str, Launch] = {}


def configuration(
    kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype, dropout: bool = False, dense: bool = False
) -> Launch:
    """The table's row for this device, with dropout and beside a dense bias."""
    arch = architecture(device)
    return _overrides.get(kernel) or table_row(kernel, arch, head_dim, dtype.itemsize, dropout, dense)


def table_row(
    kernel: str, arch: int, head_dim: int, element_size: int, dropout: bool = False, dense: bool = False
) -> Launch:
    """`arch` is 10 * major + minor of the compute capability; one without rows of its own gets those that fit
    everywhere."""
    size = (64 if head_dim <= 64 else 128), (4 if element_size > 2 else 2)
    own, any_other = (kernel, arch, *size), (kernel, 0, *size)
    dropped, dense_too = DROPOUT if dropout else {}, DENSE if dense else {}
    row = dropped.get(own) or dropped.get(any_other) or dense_too.get(own) or tuned().get(own)
    return Launch(*(row or dense_too.get(any_other) or DEFAULTS[kernel, *size]))


def user_table() -> Path:
    """Where tuned rows of this machine are kept: in $FAT5_CACHE, or in fat5/ under $XDG_CACHE_HOME or ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("FAT5_CACHE") or os.path.join(caches, "fat5")) / "launch_table.json"


@lru_cache(maxsize=1)
def tuned() -> dict[tuple[str, int, int, int], Row]:
    """The measured rows: those of the user's table, and the shipped ones that it does not replace."""
    return TUNED | read_table(user_table())


def read_table(path: Path) -> dict[tuple[str, int, int, int], Row]:
    """The rows of a user's table. A damaged file has none, and one line warns about it."""
    try:
        rows = parse_json(path.read_bytes())
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            raise ValueError("not a list of launch configurations")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as fault:
        logger.warning("%s is ignored, the shipped launch table is used: %s", path, str(fault).splitlines()[0])
        return {}
    return {tuple(row[name] for name in KEY): tuple(row[name] for name in ROW) for row in rows}  # type: ignore[misc]


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or set(row) != {*KEY, *ROW}:
        return False
    sides = (16, 32, 64, 128)
    allowed = {
        "kernel": KERNELS, "head_dim": (64, 128), "element_size": (2, 4), "block_m": sides, "block_n": sides,
        "num_warps": (1, 2, 4, 8, 16), "num_stages": range(1, 9),
    }  # fmt: skip
    return all(is_count(row[name]) for name in (*KEY[1:], *ROW)) and all(row[name] in allowed[name] for name in allowed)


def band_configuration(
    device: torch.device, head_dim: int, dtype: torch.dtype, rows: Launch, masked: bool = False
) -> Launch:
    """The band kernel's row, cut so that its queries divide a tile of the dQ pass (`rows`), and its keys its queries.

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
