"""Seconds that the GPU spends in a call, without the host's time for its launches."""

import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

# Above the clock of any GPU, so that a pause counted in cycles is never too short.
CYCLES_A_SECOND = 2.2e9
LONGEST_PAUSE = 0.02
# Larger than any L2 cache: written before each round, so that every round starts with cold inputs.
FLUSH_BYTES = 256 << 20


def stage_seconds(*stages: Callable[[], object], budget: float = 0.06) -> np.ndarray:
    """(rounds, stages): each round runs the stages in order between CUDA events, within about `budget` seconds in all.

    The device is put to sleep while the host enqueues a round, so that it then runs without gaps. No CUDA graphs: a
    capture that fails leaves PyTorch's generators unusable for the rest of the process.
    """
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    for stage in stages * 2:
        stage()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for stage in stages:
        stage()
    enqueued = time.perf_counter() - start
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    pause = int(min(1.5 * enqueued + 1e-4, LONGEST_PAUSE) * CYCLES_A_SECOND)
    rounds = int(min(max(budget / once, 5), 100))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)] for _ in range(rounds)]
    for round_marks in marks:
        flush.zero_()
        torch.cuda._sleep(pause)
        round_marks[0].record()
        for stage, mark in zip(stages, round_marks[1:]):
            stage()
            mark.record()
        # The next round's host work must not run ahead of this one's pause.
        torch.cuda.synchronize()
    return np.array([[a.elapsed_time(b) / 1e3 for a, b in pairwise(row)] for row in marks])


def seconds(call: Callable[[], object], budget: float = 0.06) -> np.ndarray:
    """(rounds,): `stage_seconds` of one call."""
    return stage_seconds(call, budget=budget)[:, 0]
