"""C1: does a learned relative bias cost nothing on the CPU? Forward and backward against SDPA, and peak memory at
length.

python benchmarks/attention_cpu.py [--threads 2] [--repeats 7] [--memory-length 8192] [--memory-heads 8]
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import measure
from fat5.ops import RelativeBias, attention

SHAPES = [(4, 8, 512, 64), (1, 8, 2048, 64)]


def problem(batch: int, heads: int, length: int, width: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """q, k, v with grad, a T5 table with grad, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(batch, heads, length, width, generator=generator) for _ in range(4))
    table = torch.randn(32, heads, generator=generator)
    return [x.requires_grad_() for x in (q * width**-0.5, k, v)], table.requires_grad_(), grad


def fat5_step(inputs: list[torch.Tensor], table: torch.Tensor, grad: torch.Tensor) -> None:
    bias = RelativeBias.from_table(table, bidirectional=True, max_distance=128)
    torch.autograd.grad(attention(*inputs, bias=bias, backend="cpu"), [*inputs, table], grad)


def sdpa_step(inputs: list[torch.Tensor], table: torch.Tensor, grad: torch.Tensor, learned: bool) -> None:
    length = inputs[0].shape[2]
    bias = RelativeBias.from_table(table, bidirectional=True, max_distance=128).dense(length, length)
    if not learned:
        bias = bias.detach()
    out = F.scaled_dot_product_attention(*inputs, attn_mask=bias, scale=1.0)
    torch.autograd.grad(out, [*inputs, table] if learned else inputs, grad)


def unbiased_step(inputs: list[torch.Tensor], grad: torch.Tensor) -> None:
    torch.autograd.grad(F.scaled_dot_product_attention(*inputs, scale=1.0), inputs, grad)


def timings(repeats: int) -> list[dict[str, object]]:
    rows = []
    for shape in SHAPES:
        inputs, table, grad = problem(*shape)
        case = "B{}-H{}-L{}-D{}".format(*shape)
        # The dense mask is made outside the clock for SDPA's detached provider: the kindest comparison to it.
        length = shape[2]
        detached = RelativeBias.from_table(table, bidirectional=True, max_distance=128).dense(length, length).detach()

        def sdpa_detached(inputs: list = inputs, detached: torch.Tensor = detached, grad: torch.Tensor = grad) -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(*inputs, attn_mask=detached, scale=1.0), inputs, grad)

        providers = {
            "fat5 cpu, learned bias": lambda i=inputs, t=table, g=grad: fat5_step(i, t, g),
            "sdpa, bias detached": sdpa_detached,
            "sdpa, learned bias": lambda i=inputs, t=table, g=grad: sdpa_step(i, t, g, learned=True),
            "sdpa, no bias": lambda i=inputs, g=grad: unbiased_step(i, g),
        }
        seconds = measure.interleaved(providers, repeats=repeats)
        ours = seconds["fat5 cpu, learned bias"]
        for name, samples in seconds.items():
            rows.append(measure.row(case, name, "forward+backward", samples, "s"))
        rows.append(
            measure.row(case, "fat5 / sdpa detached", "time ratio", ours / seconds["sdpa, bias detached"], "ratio")
        )
        rows.append(measure.row(case, "sdpa learned / fat5", "speed-up", seconds["sdpa, learned bias"] / ours, "ratio"))
    return rows


def peak_memory(provider: str, length: int, heads: int) -> float:
    """Extra bytes at the peak of one step of (1, heads, length, 64), in a process of its own."""
    command = [sys.executable, __file__, "--probe", provider, "--memory-length", str(length)]
    command += ["--memory-heads", str(heads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def probe(provider: str, length: int, heads: int) -> None:
    inputs, table, grad = problem(1, heads, length, 64)
    small, small_table, small_grad = problem(1, heads, 64, 64)
    steps = {"fat5": fat5_step, "sdpa": lambda i, t, g: sdpa_step(i, t, g, learned=True)}
    steps[provider](small, small_table, small_grad)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    before = resident("VmRSS")
    steps[provider](inputs, table, grad)
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-length", type=int, default=8192)
    parser.add_argument("--memory-heads", type=int, default=8)
    parser.add_argument("--probe", choices=["fat5", "sdpa"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.probe:
        probe(arguments.probe, arguments.memory_length, arguments.memory_heads)
        return
    rows = timings(arguments.repeats)
    length, heads = arguments.memory_length, arguments.memory_heads
    case = f"B1-H{heads}-L{length}-D64"
    extra = {name: np.array([peak_memory(name, length, heads)]) for name in ("fat5", "sdpa")}
    rows += [measure.row(case, name, "peak extra memory", value, "bytes") for name, value in extra.items()]
    rows.append(measure.row(case, "sdpa / fat5", "peak memory ratio", extra["sdpa"] / extra["fat5"], "ratio"))
    measure.save("attention_cpu", rows)


if __name__ == "__main__":
    main()
