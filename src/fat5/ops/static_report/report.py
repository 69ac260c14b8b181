"""Holds what the compiler made of each shipped configuration against the architecture: the table, and what is wrong."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fat5.ops.attention.triton_launch import ARCHITECTURES, KERNELS, Launch, Recorded, assumed_architecture
from fat5.ops.static_report.compile import Resources, compile_for, resources
from fat5.ops.static_report.problems import Problem, launches


class Architecture(NamedTuple):
    """One multiprocessor's limits, and the peaks of a card of that architecture."""

    card: str
    shared_a_block: int
    shared: int
    threads: int
    blocks: int
    flops: float
    """Dense bf16 FLOP/s with fp32 accumulation."""
    bandwidth: float
    """Bytes a second."""


# NVIDIA's CUDA programming guide (compute capabilities) and the data sheets of the cards.
LIMITS = {
    80: Architecture("A100 80GB", 163 << 10, 164 << 10, 2048, 32, 312e12, 2.04e12),
    86: Architecture("A40", 99 << 10, 100 << 10, 1536, 16, 149.7e12, 0.696e12),
    89: Architecture("L40S", 99 << 10, 100 << 10, 1536, 24, 362e12, 0.864e12),
    90: Architecture("H200", 227 << 10, 228 << 10, 2048, 32, 989e12, 4.8e12),
    100: Architecture("B200", 227 << 10, 228 << 10, 2048, 32, 2250e12, 8.0e12),
}
REGISTERS = 65536
# Shared memory that the runtime keeps for itself in each block.
RESERVED = 1 << 10
# A call of the benchmarks: 16,384 tokens in documents of 1,024, heads * head dimension = 2,048.
TOKENS, LENGTH, WIDTH, REACH = 16384, 1024, 2048, 91
# Matrix products of 2 * M * N * D, and tensors of tokens * width read or written once.
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_gradient": 4, "band": 2, "dense_gradient": 2}
TENSORS = {"forward": 4, "query_gradient": 6, "key_gradient": 6, "band": 4, "dense_gradient": 4}
# Exact fp32 at head dimension 128 with a dense bias: no smaller tile exists, and nothing trains with it.
TOLERATED_SPILLS = {("query_gradient", 128, torch.float32, "dense"): 96}
# On Blackwell the compiler calls functions around tensor memory and keeps a few registers on the stack across them: two
# or three stores a call in the machine code, far below the limit of registers.
CALL_FRAMES = {100: 32}


class Row(NamedTuple):
    """One kernel of one problem on one architecture."""

    arch: int
    kernel: str
    problem: Problem
    launch: Launch
    found: Resources | None
    fault: str
    """Empty, or what is wrong."""

    def occupancy(self) -> float:
        """Resident threads over the most that the multiprocessor holds."""
        assert self.found is not None
        limits = LIMITS[self.arch]
        registers = -(-self.found.registers // 8) * 8 * self.found.threads
        blocks = min(
            REGISTERS // registers,
            limits.shared // (self.found.shared_bytes + RESERVED),
            limits.threads // self.found.threads,
            limits.blocks,
        )
        return blocks * self.found.threads / limits.threads

    def flops(self) -> float:
        """Of the benchmark's call. The band counts the distances that can be near one of its dQ tile's sides of 64."""
        seen = LENGTH / 2 if self.problem.causal else LENGTH
        if self.kernel == "band":
            seen = min(seen, (REACH + 128) * (1 if self.problem.causal else 2))
        return PRODUCTS[self.kernel] * 2 * TOKENS * seen * WIDTH

    def bytes(self) -> float:
        """Moved if every tensor crosses the memory bus once."""
        return TENSORS[self.kernel] * TOKENS * WIDTH * self.problem.dtype.itemsize

    def roofline(self) -> float:
        """Seconds that the card of this architecture needs at least; fp32 runs as three TF32 products at half the
        rate."""
        limits = LIMITS[self.arch]
        rate = limits.flops / (6 if self.problem.dtype == torch.float32 else 1)
        return max(self.flops() / rate, self.bytes() / limits.bandwidth)


def shipped(quick: bool = False) -> list[Problem]:
    """Problems that between them use every row of the launch table in the forms that training uses."""
    if quick:
        return [Problem(64, torch.bfloat16, "relative", causal=True)]
    problems = []
    for head_dim in (64, 128):
        problems += [
            Problem(head_dim, torch.bfloat16, "relative"),
            Problem(head_dim, torch.bfloat16, "relative", causal=True),
            Problem(head_dim, torch.bfloat16, "none"),
            Problem(head_dim, torch.bfloat16, "dense", packed=False, key_mask=True),
            Problem(head_dim, torch.float32, "relative"),
            Problem(head_dim, torch.float32, "dense", packed=False, key_mask=True),
        ]
    return problems


def report(
    architectures: Sequence[int] = ARCHITECTURES,
    quick: bool = False,
    kernels: Sequence[str] = KERNELS,
    workers: int = 0,
) -> Iterator[Row]:
    """A row a kernel, as they are compiled; Triton's cache (keyed by source) makes a second run short."""
    jobs = [(arch, problem, tuple(kernels)) for arch in architectures for problem in shipped(quick)]
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        for job in jobs:
            yield from _rows(job)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        for rows in pool.imap(_rows, jobs):
            yield from rows


def _rows(job: tuple[int, Problem, tuple[str, ...]]) -> list[Row]:
    arch, problem, kernels = job
    torch.set_num_threads(1)
    with assumed_architecture(arch):
        recorded = [(one.kernel.fn.__name__.removesuffix("_kernel"), one) for one in launches(problem)]
    return [_row(arch, name, problem, one) for name, one in recorded if name in kernels]


def _row(arch: int, kernel: str, problem: Problem, recorded: Recorded) -> Row:
    assert recorded.launch is not None
    try:
        found = resources(compile_for(arch, recorded))
    except Exception as failure:  # Whatever the compiler raises, the table goes on and says so.
        line = (str(failure).splitlines() or [""])[0]
        return Row(arch, kernel, problem, recorded.launch, None, f"{type(failure).__name__}: {line}")
    return Row(arch, kernel, problem, recorded.launch, found, fault(arch, kernel, problem, found))


def fault(arch: int, kernel: str, problem: Problem, found: Resources) -> str:
    """What is wrong with a compiled kernel, or nothing."""
    tolerated = TOLERATED_SPILLS.get(
        (kernel, problem.head_dim, problem.dtype, problem.bias),
        CALL_FRAMES.get(arch, 0) if found.registers < 240 else 0,
    )
    if found.stack_bytes > tolerated:
        return f"spills {found.stack_bytes} bytes a thread"
    limit = LIMITS[arch].shared_a_block
    if found.shared_bytes > limit:
        return f"shared memory {found.shared_bytes} over {limit}"
    # Exact fp32 splits its operands in registers, which wgmma's tiles of 64 rows leave no room for.
    if arch == 90 and problem.dtype != torch.float32 and found.wgmma == 0:
        return "no wgmma"
    if found.wgmma + found.mma + found.tcgen05 == 0:
        return "no matrix instruction"
    return ""
