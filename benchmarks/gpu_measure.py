"""What the GPU benchmarks share: sections, rates of a forward and its backward, one compact CSV with the fields of
measure.py."""

import argparse
import csv
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import measure
from fat5.bench.timing import stage_seconds
from gpu_plots import draw

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
            with excused(provider):
                self._provider(case, provider, setup, teraflops)
        print(flush=True)

    def _provider(self, case: str, provider: str, setup: Setup, teraflops: float) -> None:
        call, leaves, grad_out = setup()
        taken, peak = forward_and_backward(lambda: [call()], leaves, [grad_out])
        forward, backward = 4 * teraflops / taken[:, 0], 10 * teraflops / taken[:, 1]
        self.add(case, provider, "forward", forward, "TFLOP/s")
        self.add(case, provider, "backward", backward, "TFLOP/s")
        self.add(case, provider, "peak memory", peak, "GB")
        share = ""
        if self.ceiling:
            # Of the time of both: 14 units of work, 4 of them forward.
            rate = 14 / (4 / forward + 10 / backward)
            self.add(case, provider, "share of roofline", rate / self.ceiling, "ratio")
            share = f" {np.median(rate) / self.ceiling:.0%}"
        print(f"  {provider} {np.median(forward):.0f}/{np.median(backward):.0f} {peak:.1f}{share}", end="", flush=True)


def run_sections(
    question: str,
    description: str | None,
    seconds: float,
    sections: dict[str, tuple[Callable[[Results, float], None], float]],
) -> None:
    """The command line of a benchmark that runs unattended: a section that fails says so and the next one goes on.

    Each section has the share of the seconds after which its loops end.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=seconds, help="no section starts, and loops end, after this")
    parser.add_argument("--sections", default=",".join(sections), help="which, in order")
    options = parser.parse_args()
    results = Results(options.output_dir, question)
    print(f"{torch.cuda.get_device_name()}, {measure.versions()}", flush=True)
    for name in options.sections.split(","):
        section, share = sections[name]
        left = options.seconds - results.elapsed()
        if left < 5:
            print(f"== {name}: not run, out of time")
            continue
        print(f"== {name} ({results.elapsed():.0f} s)", flush=True)
        try:
            section(results, time.perf_counter() + min(left, share * options.seconds))
        except Exception:
            print()
            traceback.print_exc(limit=6)
        results.write()
        torch.cuda.empty_cache()
    for picture in draw(results.path, options.output_dir):
        print(f"wrote {picture}")
    print(f"wrote {results.path} after {results.elapsed():.0f} s")


@contextmanager
def excused(provider: str) -> Iterator[None]:
    """Inside, a failure is printed beside the provider's name, and the others go on."""
    try:
        yield
    except Exception as failure:
        print(f"  {provider} {type(failure).__name__} {str(failure)[:70]!r}", end="", flush=True)


def forward_and_backward(
    call: Callable[[], list[torch.Tensor]],
    leaves: list[torch.Tensor],
    grad_out: list[torch.Tensor],
    budget: float = 0.06,
) -> tuple[np.ndarray, float]:
    """(rounds, 2) seconds of forward and backward, and the peak memory in GB beyond what the inputs hold."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(call(), leaves, grad_out)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    kept: list[list[torch.Tensor]] = []
    taken = stage_seconds(
        lambda: kept.append(call()), lambda: torch.autograd.grad(kept.pop(), leaves, grad_out), budget=budget
    )
    return taken, peak
