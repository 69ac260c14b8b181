"""What the GPU benchmarks share: rates of a forward and its backward, one compact CSV with the fields of measure.py."""

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import measure
from fat5.bench.timing import stage_seconds

Setup = Callable[[], tuple[Callable[[], torch.Tensor], list[torch.Tensor], torch.Tensor]]
"""Makes a call, the leaves whose gradients it owes, and the gradient of its output."""


class Results:
    """Rows as measure.py has them, written after every section; machine and versions stand in the first row only."""

    def __init__(self, output_dir: Path, question: str) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.ceiling: float | None = None
        """TFLOP/s of a large matrix product on this card, once it is measured."""
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
            for n, row in enumerate(self.rows):
                writer.writerow(row | stamp if n == 0 else row)

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def line(self, case: str, providers: dict[str, Setup], teraflops: float, deadline: float) -> None:
        """Measures the providers one after another, and prints `provider forward/backward TFLOP/s peak GB` for each.

        `teraflops` is what one unit of Lq * Lk * D over all heads comes to: 4 of them forward, 10 backward.
        """
        print(f"{case:20}", end="", flush=True)
        for provider, setup in providers.items():
            if time.perf_counter() > deadline:
                print("  out of time", end="")
                break
            try:
                forward, backward, peak = self._rates(setup, teraflops)
            except Exception as failure:
                what = f"{type(failure).__name__} {str(failure)[:70]!r}"
                print(f"  {provider} {what}", end="", flush=True)
                continue
            self.add(case, provider, "forward", forward, "TFLOP/s")
            self.add(case, provider, "backward", backward, "TFLOP/s")
            self.add(case, provider, "peak memory", peak, "GB")
            share = ""
            if self.ceiling:
                # Of the time of both: 14 units of work, 4 of them forward.
                rate = 14 / (4 / forward + 10 / backward)
                self.add(case, provider, "share of roofline", rate / self.ceiling, "ratio")
                share = f" {np.median(rate) / self.ceiling:.0%}"
            print(
                f"  {provider} {np.median(forward):.0f}/{np.median(backward):.0f} {peak:.1f}{share}", end="", flush=True
            )
        print(flush=True)

    def _rates(self, setup: Setup, teraflops: float) -> tuple[np.ndarray, np.ndarray, float]:
        call, leaves, grad_out = setup()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(call(), leaves, grad_out)
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        out: list[torch.Tensor] = []

        def forward() -> None:
            out[:] = [call()]

        def backward() -> None:
            torch.autograd.grad(out.pop(), leaves, grad_out)

        taken = stage_seconds(forward, backward)
        return 4 * teraflops / taken[:, 0], 10 * teraflops / taken[:, 1], peak
