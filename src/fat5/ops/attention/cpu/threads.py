"""Runs the compiled worker of kernels.py on several threads: PyTorch's own OpenMP team where it can be reached.

A second team would contend with PyTorch's for the cores: idle threads of OpenMP spin for a while.
"""

import ctypes
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fat5.ops.attention.cpu import kernels as cpu_kernels

_Worker = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(call: int, threads: int) -> None:
    """`worker(call)` on each of `threads` threads, this one among them; returns when all have."""
    work = _compiled()
    if threads <= 1:
        work(call)
        return
    team = _team()
    if team is not None:
        team(work, call, threads, 0)
        return
    others = [threading.Thread(target=work, args=(call,)) for _ in range(threads - 1)]
    for other in others:
        other.start()
    work(call)
    for other in others:
        other.join()


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # ctypes lets go of the interpreter's lock while it runs. The cfunc object owns the code.
    _compiled_owner.append(cpu_kernels.worker())
    return _Worker(_compiled_owner[0].address)


_compiled_owner: list[Any] = []


@lru_cache(maxsize=1)
def _team() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that came with PyTorch; None without."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            team = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        team.argtypes, team.restype = [_Worker, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return team
    return None
