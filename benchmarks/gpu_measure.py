"""How the GPU benchmarks measure: CUDA graph replay, medians, FLOPs counted, one CSV with the fields of measure.py."""

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import measure

# Long enough that the clock settles, short enough that a suite of hundreds of points ends in minutes.
MILLISECONDS_A_POINT = 60.0


def seconds(call: Callable[[], object], graph: bool = True) -> np.ndarray:
    """Seconds a call, over several replays of a CUDA graph of calls (or over plain calls where it cannot be captured)."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    captured = _captured(call) if graph else None
    replay = call if captured is None else captured.replay
    once = _timed(replay, 1)[0]
    rounds = int(min(max(MILLISECONDS_A_POINT / 1e3 / max(once, 1e-6), 5), 200))
    return _timed(replay, rounds)


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _timed(call: Callable[[], object], rounds: int) -> np.ndarray:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, stop in marks:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return np.array([start.elapsed_time(stop) / 1e3 for start, stop in marks])


class Results:
    """Rows as measure.py has them, printed as they come and written after every section."""

    def __init__(self, output_dir: Path, question: str) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path, self.rows, self.started = output_dir / f"{question}.csv", [], time.perf_counter()

    def add(self, case: str, provider: str, metric: str, samples: np.ndarray | float, unit: str) -> None:
        samples = np.atleast_1d(np.asarray(samples, dtype=float))
        self.rows.append(measure.row(case, provider, metric, samples, unit))

    def write(self) -> None:
        stamp = {"machine": measure.machine(), "versions": measure.versions(), "commit": measure.commit()}
        stamp |= {"date": time.strftime("%Y-%m-%d"), "command": "python " + " ".join(sys.argv)}
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, measure.FIELDS)
            writer.writeheader()
            writer.writerows(row | stamp for row in self.rows)

    def elapsed(self) -> float:
        return time.perf_counter() - self.started
