"""Compiles a recorded kernel launch ahead of time for an architecture, and reads registers, spills and instructions."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fat5.ops.triton.launch import Recorded


class Resources(NamedTuple):
    """What one compiled kernel needs of a multiprocessor: a thread's registers and local memory (0 bytes: nothing
    spilled), a program's shared memory and threads; the matrix instructions in its PTX, of Hopper (wgmma), Ampere (mma)
    and Blackwell (tcgen05); and the instructions inside its loops that touch local memory."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    wgmma: int
    mma: int
    tcgen05: int
    spills_in_loops: int


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


def compile_for(arch: int, recorded: Recorded) -> Any:
    """Triton's compiled kernel for `arch` (10 * major + minor), the one that the launch would use there.

    Raises:
        triton.compiler.errors.CompilationError, triton.runtime.errors.PTXASError: it does not compile.
    """
    before = getattr(driver, "_active", None)
    driver.set_active(_AheadOfTime(arch))
    try:
        return recorded.kernel.warmup(**recorded.arguments, grid=recorded.grid, **recorded.options())
    finally:
        driver.set_active(before)


def resources(compiled: Any) -> Resources:
    """Reads the machine code with the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump said nothing of registers: {usage[:200]}")
        in_loops = spills_in_loops(cuobjdump("-sass", file.name)) if found[2] != "0" else 0
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tcgen05=ptx.count("tcgen05.mma"),
        spills_in_loops=in_loops,
    )


def cuobjdump(option: str, cubin: str) -> str:
    """What the tool in Triton's wheel says of a file of machine code."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, option, cubin], capture_output=True, text=True, check=True).stdout


def spills_in_loops(sass: str) -> int:
    """Loads from and stores to local memory between a branch back and where it leads; all, if none leads back."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?);", sass, re.MULTILINE)
    code = [(int(address, 16), words) for address, words in lines]
    branches = [(int(at[1], 16), here) for here, words in code if (at := re.search(r"BRA\b.*0x([0-9a-f]+)", words))]
    loops = [(target, here) for target, here in branches if target < here]
    local = [here for here, words in code if re.search(r"\b(LDL|STL)\b", words)]
    return sum(any(first <= here <= last for first, last in loops) for here in local) if loops else len(local)
