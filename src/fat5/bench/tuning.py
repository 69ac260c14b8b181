"""Measures every candidate configuration of the attention kernels on this GPU, and keeps the best in the user's launch
table."""

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fat5.bench.static_report.problems import Problem, launches
from fat5.bench.timing import seconds
from fat5.files import write_atomically
from fat5.machine import available_cores
from fat5.ops.attention.api import attention
from fat5.ops.attention.bias import RelativeBias
from fat5.ops.attention.triton.configuration import (
    KEY,
    ROW,
    configuration,
    overridden,
    tuned,
)
from fat5.ops.attention.triton.launch_table import TUNED, Row
from fat5.ops.triton.launch import Launch, architecture, assumed_architecture, recording

TOKENS, WIDTH, REACH = 16384, 2048, 91
TYPE = torch.bfloat16
# (length, causal): a row must serve them all, so the least sum of times relative to the best of each wins.
SETTINGS = ((1024, False), (4096, False), (1024, True))
SMALL_BAND = Launch(32, 32, 4, 2)

# By kernel and head dimension. The dQ pass comes before the band, whose work depends on the tile of the former.
CANDIDATES: dict[tuple[str, int], list[Row]] = {
    ("forward", 64): [(64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)],
    ("query_gradient", 64): [(64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 4, 3), (128, 32, 8, 3)],
    ("key_gradient", 64): [(32, 64, 4, 3), (16, 64, 4, 4), (64, 64, 4, 2)],
    ("band", 64): [(64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)],
    ("forward", 128): [(128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3)],
    ("query_gradient", 128): [(128, 64, 8, 3), (64, 32, 4, 3), (64, 32, 4, 2), (128, 32, 8, 3)],
    ("key_gradient", 128): [(16, 64, 4, 3), (16, 128, 8, 3), (32, 32, 4, 3)],
    ("band", 128): [(64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)],
}
Measured = Callable[[str, Row, np.ndarray], None]


def tune(deadline: float, measured: Measured | None = None, note: Callable[[str], None] = print) -> dict[str, int]:
    """Tries all candidates until `deadline` (time.perf_counter), and takes each winner into the table in use.

    A kernel and head dimension that were not measured at every setting before the deadline keep the row they have.

    Args:
        deadline: no measurement starts after it.
        measured: called with (case, candidate, seconds) of each measurement.
        note: called with one line a kernel.

    Returns:
        How many kernels of a head dimension were "tuned" and how many "left".
    """
    arch = architecture(torch.device("cuda"))
    precompile(candidate_jobs(), arch, deadline)
    counts = {"tuned": 0, "left": 0}
    for (kernel, width), candidates in CANDIDATES.items():
        before: Row = tuple(configuration(kernel, torch.device("cuda"), width, TYPE))  # type: ignore[assignment]
        times = _times(kernel, width, list(dict.fromkeys([before, *candidates])), deadline, measured, note)
        if not times:
            counts["left"] += 1
            note(f"{kernel} D{width}: out of time, keeps {_name(before)}")
            continue
        fastest = [min(column) for column in zip(*times.values())]
        order = sorted(times, key=lambda row: sum(t / f for t, f in zip(times[row], fastest)))
        tuned()[(kernel, arch, width, TYPE.itemsize)] = order[0]
        counts["tuned"] += 1
        shown = ", ".join(
            f"{_name(row)}{'*' if row == before else ''} {'/'.join(f'{t * 1e6:.0f}' for t in times[row])}"
            for row in order[:5]
        )
        note(f"{kernel} D{width} us ({len(times)} of {len(candidates)}): {shown}")
    return counts


class Job(NamedTuple):
    """Something to compile ahead: the kernels of a problem, or the one that is named."""

    problem: Problem
    launches: dict[str, Launch]
    kernel: str = ""


def precompile(jobs: list[Job], arch: int, deadline: float) -> None:
    """Fills Triton's cache in processes that do not touch the GPU; compiling is most of the time that measuring
    takes."""
    workers = min(14, available_cores())
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = pool.map_async(_compile, [(job, arch) for job in jobs], chunksize=1)
        done.wait(max(deadline - time.perf_counter(), 1))


def _compile(item: tuple[Job, int]) -> None:
    from fat5.bench.static_report.compile import compile_for

    job, arch = item
    with assumed_architecture(arch):
        recorded = launches(job.problem, **job.launches)
    for one in recorded:
        if job.kernel in ("", one.name):
            try:
                compile_for(arch, one)
            except Exception:  # The measurement will meet it again, and say so.
                continue


def candidate_jobs() -> list[Job]:
    """Every candidate of every kernel, bidirectional and causal."""
    return [
        Job(Problem(width, TYPE, "relative", causal, packed=False), around(kernel, Launch(*row)), kernel)
        for (kernel, width), rows in CANDIDATES.items()
        for row in rows
        for causal in (False, True)
    ]


def _times(
    kernel: str,
    width: int,
    candidates: list[Row],
    deadline: float,
    measured: Measured | None,
    note: Callable[[str], None],
) -> dict[Row, list[float]]:
    """Seconds at each setting, of the candidates that run; nothing when time ran out."""
    times: dict[Row, list[float]] = {row: [] for row in candidates}
    for length, causal in SETTINGS:
        for row in list(times):
            if time.perf_counter() > deadline:
                return {}
            try:
                found = kernel_seconds(kernel, width, Launch(*row), length, causal)
            except Exception as failure:  # Too much shared memory, most often: this candidate is out, the next may run.
                note(f"{kernel} D{width} {_name(row)}: {type(failure).__name__} {str(failure)[:80]!r}")
                del times[row]
                continue
            times[row].append(float(np.median(found)))
            if measured is not None:
                measured(f"{kernel} D{width} L{length}{' causal' if causal else ''}", row, found)
    return times


def around(kernel: str, launch: Launch) -> dict[str, Launch]:
    """The candidate, and with a dQ tile a band tile that need not be cut for it."""
    return {kernel: launch, "band": SMALL_BAND} if kernel == "query_gradient" else {kernel: launch}


def kernel_seconds(kernel: str, width: int, launch: Launch, length: int, causal: bool) -> np.ndarray:
    """Of one kernel alone, inside a forward and backward whose gradients must come out finite."""
    q, k, v, vector, grad_out = inputs(width, length)
    with recording(run=True) as recorded, overridden(**around(kernel, launch)):
        out = attention(q, k, v, bias=RelativeBias(vector), causal=causal, backend="triton")
        gradients = torch.autograd.grad(out, (q, k, v, vector), grad_out)
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise ArithmeticError("gradients are not finite")
    return seconds(next(one.run for one in recorded if one.name == kernel))


def inputs(width: int, length: int, key_length: int | None = None) -> tuple[torch.Tensor, ...]:
    """q, k, v, a bias vector and the gradient of the output: 16,384 queries of heads * head dimension = 2,048."""

    def rows(length: int) -> torch.Tensor:
        shape = (batch, length, WIDTH // width, width)
        return (torch.randn(shape, device="cuda") * 0.5).to(TYPE).transpose(1, 2).requires_grad_()

    batch = TOKENS // length
    q, k, v, grad_out = rows(length), *(rows(key_length or length) for _ in range(2)), rows(length)
    vector = torch.randn(WIDTH // width, 2 * REACH + 1, device="cuda", requires_grad=True)
    return q, k, v, vector, grad_out.detach()


def write_table(path: Path) -> None:
    """Writes the rows in use that are not the shipped ones, as `configuration.read_table` reads them."""
    rows = [dict(zip(KEY + ROW, key + row)) for key, row in sorted(tuned().items()) if TUNED.get(key) != row]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _name(row: tuple[int, ...]) -> str:
    return "x".join(map(str, row))
