"""Compiles every shipped configuration and compares its resources with the architecture's limits."""

import multiprocessing
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from fat5.bench.static_report.compile import Resources, compile_for, resources
from fat5.bench.static_report.problems import FUSED, FusedProblem, Problem, launches
from fat5.machine import available_cores
from fat5.ops.attention.triton.configuration import ARCHITECTURES, KERNELS
from fat5.ops.triton.launch import Launch, Recorded, assumed_architecture


class Architecture(NamedTuple):
    """A card; the limits of its multiprocessors (shared memory in bytes); its peaks in dense bf16 FLOP/s, fp32 FLOP/s
    outside the matrix units, and bytes a second."""

    card: str
    shared_a_block: int
    shared: int
    threads: int
    blocks: int
    flops: float
    vector_flops: float
    bandwidth: float


# NVIDIA's CUDA programming guide (compute capabilities) and the data sheets of the cards.
LIMITS = {
    80: Architecture("A100 80GB", 163 << 10, 164 << 10, 2048, 32, 312e12, 19.5e12, 2.04e12),
    86: Architecture("A40", 99 << 10, 100 << 10, 1536, 16, 149.7e12, 37.4e12, 0.696e12),
    89: Architecture("L40S", 99 << 10, 100 << 10, 1536, 24, 362e12, 91.6e12, 0.864e12),
    90: Architecture("H200", 227 << 10, 228 << 10, 2048, 32, 989e12, 67e12, 4.8e12),
    100: Architecture("B200", 227 << 10, 228 << 10, 2048, 32, 2250e12, 75e12, 8.0e12),
}
REGISTERS = 65536
# Shared memory that the runtime keeps for itself in each block.
RESERVED = 1 << 10
# A call of the benchmarks: 16,384 tokens in documents of 1,024, heads * head dimension = 2,048; fused operations take
# 16,384 rows of the problem's width, a rotation 2,048 of them, an optimizer's step the 305 million weights of base.
TOKENS, LENGTH, WIDTH, REACH, WEIGHTS = 16384, 1024, 2048, 91, 305_184_000
# Matrix products of 2 * M * N * D, and tensors of tokens * width read or written once.
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_gradient": 4, "band": 2, "dense_gradient": 2}
TENSORS = {"forward": 4, "query_gradient": 6, "key_gradient": 6, "band": 4, "dense_gradient": 4}
# A fused kernel's operations an element, and the numbers of the problem's dtype that it reads or writes an element.
ELEMENTWISE = {
    "rms_norm_forward": (4, 2),
    "rms_norm_backward": (9, 3),
    "geglu_forward": (13, 3),
    "geglu_backward": (22, 5),
    "rotary": (3, 2),
    "cross_entropy": (14, 2),
    "square_sum": (2, 1),
    "adamw_scale": (16, 3),
}
# The moments, in and out: fp32 beside weights of any dtype; narrow weights have a compensation too.
MOMENT_BYTES, COMPENSATIONS = 16, 2
# Exact fp32 at head dimension 128 with a dense bias: no smaller tile exists, and nothing trains with it.
TOLERATED_SPILLS = {("query_gradient", 128, torch.float32, "dense"): 96}
# Four registers that the machine code stores once before a kernel's loops and loads once after them: about ten of a
# program's thousands of instructions, and the compiler's choice even at half of its registers (decision 0054).
SPILLS_OUTSIDE_LOOPS = 16
# On Blackwell the compiler calls functions around tensor memory and keeps a few registers on the stack across them: two
# or three stores a call in the machine code, far below the limit of registers.
CALL_FRAMES = {100: 32}


class Row(NamedTuple):
    """One kernel of one problem on one architecture: its launch configuration (None for the small kernels, which have
    one size), what it was compiled to, what is wrong with it, and the options compiled into a fused kernel."""

    arch: int
    kernel: str
    problem: Problem | FusedProblem
    launch: Launch | None
    found: Resources | None = None
    fault: str = ""
    flags: str = ""

    def words(self) -> list[str]:
        """Kernel, width and dtype, then the problem and the options in words."""
        dtype = str(self.problem.dtype).removeprefix("torch.")
        return [self.kernel, str(self.problem.width), dtype, *self.problem.label().split(), *self.flags.split()]

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
        """Operations of the benchmark's call. The band counts the distances near a dQ tile with sides of 64."""
        if isinstance(self.problem, FusedProblem):
            return ELEMENTWISE.get(self.kernel, (0, 0))[0] * self.elements()
        seen = LENGTH / 2 if self.problem.causal else LENGTH
        if self.kernel == "band":
            seen = min(seen, (REACH + 128) * (1 if self.problem.causal else 2))
        return PRODUCTS.get(self.kernel, 0) * 2 * TOKENS * seen * WIDTH

    def bytes(self) -> float:
        """Moved if every tensor crosses the memory bus once; those of the small kernels round to none."""
        size = self.problem.dtype.itemsize
        if isinstance(self.problem, FusedProblem):
            each = ELEMENTWISE.get(self.kernel, (0, 0))[1] * size
            if self.kernel == "adamw_scale":
                each += MOMENT_BYTES + (COMPENSATIONS * size if size < 4 else 0)
            if self.kernel == "cross_entropy" and "gradient" not in self.flags:
                each -= size  # The logits stay as they are.
            return each * self.elements()
        return TENSORS.get(self.kernel, 0) * TOKENS * WIDTH * size

    def elements(self) -> float:
        """Elements of the benchmark's call of a fused operation."""
        assert isinstance(self.problem, FusedProblem)
        wide = {"rotary": WIDTH, "adamw_scale": WEIGHTS / TOKENS}
        return TOKENS * wide.get(self.problem.operation, self.problem.width)

    def roofline(self) -> float:
        """Seconds that the card of this architecture needs at least; fp32 products run as three of TF32 at half the
        rate."""
        limits = LIMITS[self.arch]
        rate = limits.flops / (6 if self.problem.dtype == torch.float32 else 1)
        if isinstance(self.problem, FusedProblem):
            rate = limits.vector_flops
        return max(self.flops() / rate, self.bytes() / limits.bandwidth)


def shipped(quick: bool = False) -> list[Problem | FusedProblem]:
    """Problems that between them use every row of the launch table in the forms that training uses, and every fused
    kernel at the sizes of the presets; `quick`: learned bias in bfloat16, and the fused kernels of base."""
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32)
    problems: list[Problem | FusedProblem] = []
    for head_dim in (64, 128):
        problems += [
            Problem(head_dim, torch.bfloat16, "relative"),
            Problem(head_dim, torch.bfloat16, "relative", causal=True),
        ]
        if quick:
            continue
        problems += [
            Problem(head_dim, torch.bfloat16, "relative", packed=False, key_mask=True),
            Problem(head_dim, torch.bfloat16, "relative", causal=True, dropout_p=0.1),
            Problem(head_dim, torch.bfloat16, "none"),
            Problem(head_dim, torch.bfloat16, "none", dropout_p=0.1),
            Problem(head_dim, torch.bfloat16, "dense", packed=False, key_mask=True),
            Problem(head_dim, torch.bfloat16, "dense", packed=False, key_mask=True, dropout_p=0.1),
            Problem(head_dim, torch.float32, "relative"),
            Problem(head_dim, torch.float32, "relative", dropout_p=0.1),
            Problem(head_dim, torch.float32, "dense", packed=False, key_mask=True),
        ]
    for operation in FUSED:
        widths = WIDTHS[operation][:1] if quick else WIDTHS[operation]
        problems += [FusedProblem(operation, width, dtype) for dtype in dtypes for width in widths]
    return problems


# Base, then small and large, then what strains a kernel: the longest row, a vocabulary not a multiple of 16.
WIDTHS = {
    "rms_norm": (768, 512, 1024, 2048, 4096, 8192),
    "geglu": (2048, 1000),
    "geglu_joined": (2048, 1000),
    "rotary": (64, 128),
    "linear_cross_entropy": (32768, 32003),
    "adamw_scale": (1 << 20, 1001),
    "decoding": (768, 512, 1024),
}


def report(
    architectures: Sequence[int] = ARCHITECTURES, quick: bool = False, workers: int = 0, only: Sequence[str] = ()
) -> Iterator[tuple[float, list[Row]]]:
    """The share of the work that is done and the rows of one problem, again and again; Triton's cache (keyed by source)
    makes a second run short.

    Args:
        only: words that a row must all have (`Row.words`) to be compiled.
    """
    jobs = [(arch, problem, frozenset(only)) for arch in architectures for problem in shipped(quick)]
    # Attention's kernels take some ten times as long to compile as those of a fused operation.
    costs = [10 if isinstance(problem, Problem) else 1 for _, problem, _ in jobs]
    with multiprocessing.get_context("spawn").Pool(min(workers or available_cores(), len(jobs))) as pool:
        for done, rows in zip(accumulate(costs), pool.imap(_rows, jobs)):
            yield done / sum(costs), rows


def _rows(job: tuple[int, Problem | FusedProblem, frozenset[str]]) -> list[Row]:
    arch, problem, only = job
    torch.set_num_threads(1)
    with assumed_architecture(arch):
        # The work list and its like run more than once in the same form.
        distinct = {(one.kernel, str(one.options())): one for one in reversed(launches(problem))}
        rows = [_row(arch, problem, one, only) for one in reversed(distinct.values())]
    return [row for row in rows if row is not None]


def _row(arch: int, problem: Problem | FusedProblem, recorded: Recorded, only: frozenset[str]) -> Row | None:
    flags = ""
    if isinstance(problem, FusedProblem):
        flags = " ".join(name.lower() for name, value in recorded.constants.items() if value is True)
    row = Row(arch, recorded.name, problem, recorded.launch, flags=flags)
    if not only.issubset(row.words()):
        return None
    try:
        found = resources(compile_for(arch, recorded))
    except Exception as failure:  # Whatever the compiler raises, the table goes on and says so.
        line = (str(failure).splitlines() or [""])[0]
        return row._replace(fault=f"{type(failure).__name__}: {line}")
    return row._replace(found=found, fault=fault(arch, recorded.name, problem, found))


def fault(arch: int, kernel: str, problem: Problem | FusedProblem, found: Resources) -> str:
    """What is wrong with a compiled kernel, or nothing."""
    allowed = [0 if found.spills_in_loops else SPILLS_OUTSIDE_LOOPS]
    allowed += [CALL_FRAMES.get(arch, 0)] if found.registers < 240 else []
    if isinstance(problem, Problem):
        allowed += [TOLERATED_SPILLS.get((kernel, problem.width, problem.dtype, problem.bias), 0)]
    if found.stack_bytes > max(allowed):
        return f"spills {found.stack_bytes} bytes a thread, {found.spills_in_loops} instructions in loops"
    limit = LIMITS[arch].shared_a_block
    if found.shared_bytes > limit:
        return f"shared memory {found.shared_bytes} over {limit}"
    if kernel not in KERNELS:
        return ""
    # Exact fp32 splits its operands in registers, which wgmma's tiles of 64 rows leave no room for.
    if arch == 90 and problem.dtype != torch.float32 and found.wgmma == 0:
        return "no wgmma"
    if found.wgmma + found.mma + found.tcgen05 == 0:
        return "no matrix instruction"
    return ""
