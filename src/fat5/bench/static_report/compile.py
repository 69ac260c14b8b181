"""Compiles a recorded kernel launch ahead of time for an architecture, and reads registers, spills and instructions."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fat5.ops.triton.launch import Recorded


class Resources(NamedTuple):
    """What one compiled kernel needs of a multiprocessor."""

    registers: int
    """A thread."""
    stack_bytes: int
    """A thread's local memory: 0 means that nothing spilled."""
    shared_bytes: int
    """A program."""
    threads: int
    """A program."""
    wgmma: int
    """Hopper's asynchronous matrix instructions in the PTX."""
    mma: int
    """Ampere's matrix instructions in the PTX."""
    tcgen05: int
    """Blackwell's matrix instructions in the PTX."""


class _AheadOfTime:
    """Replaces Triton's driver: compiling needs an architecture and no device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_for(arch: int, recorded: Recorded) -> Any:
    """Triton's compiled kernel for `arch` (10 * major + minor), the one that the launch would use there.

    Raises:
        triton.compiler.errors.CompilationError, triton.runtime.errors.PTXASError: it does not compile.
    """
    before = driver._active if hasattr(driver, "_active") else None
    driver.set_active(_AheadOfTime(arch))
    try:
        return recorded.kernel.warmup(**recorded.arguments, grid=recorded.grid, **recorded.options())
    finally:
        if before is not None:
            driver.set_active(before)


def resources(compiled: Any) -> Resources:
    """Reads the machine code with the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {usage[:200]}")
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tcgen05=ptx.count("tcgen05.mma"),
    )


def tool(name: str) -> str:
    """Path of a binary in Triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
