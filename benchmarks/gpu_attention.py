"""Attention on a GPU: correctness first, then configurations, then speed against SDPA, FlexAttention and plain flash.

    PYTHONPATH=src python3 benchmarks/gpu_attention.py --output_dir results [--seconds 460] [--sections tests,tune]

Runs unattended; a section that fails says so and the next one goes on. Sizes follow the papers: 16,384 tokens a call and
heads * head_dim = 2,048. TFLOP/s count 4 * Lq * Lk * D a head forward and 10 backward, half of that when causal.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fat5.ops import RelativeBias, attention
from fat5.ops.attention.triton_launch import Launch, configuration, overridden, recording
from fat5.ops.static_report.compile import compile_for
from fat5.ops.static_report.problems import Problem, launches
from gpu_measure import Results, seconds

ROOT = Path(__file__).resolve().parent.parent
TOKENS, WIDTH, REACH = 16384, 2048, 91
TYPE = torch.bfloat16

# (block_m, block_n, num_warps, num_stages), by kernel and head dimension.
CANDIDATES = {
    ("forward", 64): [(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 4, 3), (64, 128, 4, 2), (128, 32, 8, 3)],
    ("query_gradient", 64): [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 64, 4, 2), (64, 128, 4, 2)],
    ("key_gradient", 64): [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 8, 2), (128, 128, 8, 2), (32, 128, 4, 2), (128, 64, 8, 2)],
    ("band", 64): [(64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3)],
    ("forward", 128): [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3)],
    ("query_gradient", 128): [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 2), (64, 128, 8, 2)],
    ("key_gradient", 128): [(32, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 3), (32, 64, 4, 3), (32, 64, 4, 2)],
    ("band", 128): [(64, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 3)],
}  # fmt: skip
FLOPS = {"forward": 4, "query_gradient": 6, "key_gradient": 8, "band": 4, "backward": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=460.0, help="no section starts, and loops end, after this long"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, in order")
    options = parser.parse_args()
    results = Results(options.output_dir, "gpu_attention")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, python {sys.version.split()[0]}", flush=True)
    for name in options.sections.split(","):
        left = options.seconds - results.elapsed()
        if left < 5:
            print(f"== {name}: not run, out of time")
            continue
        print(f"== {name} ({results.elapsed():.0f} s)", flush=True)
        try:
            SECTIONS[name](results, time.perf_counter() + left)
        except Exception:
            traceback.print_exc(limit=6)
        results.write()
        torch.cuda.empty_cache()
    print(f"wrote {results.path} after {results.elapsed():.0f} s")


def ceilings(results: Results, deadline: float) -> None:
    """What this card gives a large matrix product and a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=TYPE) for _ in range(2))
    rate = 2 * 8192**3 / seconds(lambda: a @ b) / 1e12
    source, target = (torch.empty(2**31, device="cuda", dtype=torch.uint8).random_() for _ in range(2))
    bandwidth = 2 * 2**31 / seconds(lambda: target.copy_(source)) / 1e12
    results.add("ceiling", "torch", "bf16 matrix product", rate, "TFLOP/s")
    results.add("ceiling", "torch", "copy", bandwidth, "TB/s")
    print(f"matrix product {np.median(rate):.0f} TFLOP/s, copy {np.median(bandwidth):.2f} TB/s")


def tests(results: Results, deadline: float) -> None:
    """The kernel tests on the device, with xdist, since most of their time is compilation."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/ops/test_triton_attention.py",
        "-q",
        "-n",
        str(min(12, os.cpu_count() or 1)),
    ]
    command += [
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "--timeout=240",
        "--tb=short",
        "--maxfail=12",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=max(deadline - time.perf_counter(), 10),
    )
    lines = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED", "ERROR", "E  ")) or "passed" in line or "failed" in line
    ]
    (results.path.parent / "tests.log").write_text(done.stdout + done.stderr)
    print("\n".join(lines[-40:]) or done.stdout[-1500:] + done.stderr[-1500:])
    results.add("tests", "fat5", "exit code", float(done.returncode), "")


def tune(results: Results, deadline: float) -> None:
    """Every candidate of every kernel, alone, with the relative bias; the best and the table's row side by side."""
    jobs = [(kernel, width, launch) for (kernel, width), found in CANDIDATES.items() for launch in found]
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        compiled = pool.map_async(_compile_candidate, jobs, chunksize=1)
        compiled.wait(max(deadline - time.perf_counter() - 60, 10))
    print(f"compiled {len(jobs)} candidates ({results.elapsed():.0f} s)", flush=True)
    for (kernel, width), candidates in CANDIDATES.items():
        for length, causal in ((1024, False), (4096, False), (1024, True)):
            lines = []
            for candidate in candidates:
                if time.perf_counter() > deadline - 20:
                    return
                try:
                    took = float(np.median(_kernel_seconds(kernel, width, Launch(*candidate), length, causal)))
                except Exception as failure:
                    print(f"{kernel} D{width} {candidate}: {type(failure).__name__} {str(failure)[:90]!r}")
                    continue
                case = f"{kernel} D{width} L{length}{' causal' if causal else ''}"
                results.add(case, "x".join(map(str, candidate)), "time", took, "s")
                lines.append((took, candidate))
            table = tuple(configuration(kernel, torch.device("cuda"), width, TYPE))
            shown = "  ".join(
                f"{'x'.join(map(str, c))}{'*' if c == table else ''} {t * 1e6:.0f}" for t, c in sorted(lines)[:6]
            )
            print(f"{kernel:14} D{width} L{length}{' causal' if causal else '':7} us: {shown}", flush=True)


def _compile_candidate(job: tuple[str, int, tuple[int, int, int, int]]) -> None:
    """Fills Triton's cache, in a process without the GPU."""
    kernel, width, candidate = job
    for causal in (False, True):
        try:
            problem = Problem(width, TYPE, "relative", causal=causal, packed=False)
            for recorded in launches(problem, **_around(kernel, Launch(*candidate))):
                if recorded.kernel.fn.__name__.startswith(kernel):
                    compile_for(_arch(), recorded)
        except Exception:
            continue


def _arch() -> int:
    return int(os.environ.setdefault("FAT5_BENCH_ARCH", "90"))


def _around(kernel: str, launch: Launch) -> dict[str, Launch]:
    """The candidate, and with it whatever makes a band tile divide a dQ tile."""
    if kernel == "band":
        return {"band": launch, "query_gradient": Launch(128, 64, 8, 2)}
    return {kernel: launch, "band": Launch(32, 32, 4, 2)} if kernel == "query_gradient" else {kernel: launch}


def _kernel_seconds(kernel: str, width: int, launch: Launch, length: int, causal: bool) -> np.ndarray:
    q, k, v, vector, grad_out = _inputs(width, length)
    with recording(run=True) as recorded, overridden(**_around(kernel, launch)):
        out = attention(q, k, v, bias=RelativeBias(vector), causal=causal, backend="triton")
        out.backward(grad_out)
    if not all(x.grad.isfinite().all() for x in (q, k, v, vector)):
        raise ArithmeticError("gradients are not finite")
    one = next(one for one in recorded if one.kernel.fn.__name__ == f"{kernel}_kernel")
    return seconds(one.run)


def _inputs(width: int, length: int) -> tuple[torch.Tensor, ...]:
    shape = (TOKENS // length, length, WIDTH // width, width)
    q, k, v, grad_out = ((torch.randn(shape, device="cuda") * 0.5).to(TYPE).transpose(1, 2) for _ in range(4))
    vector = torch.randn(shape[2], 2 * REACH + 1, device="cuda")
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), vector.requires_grad_(), grad_out


def breakdown(results: Results, deadline: float) -> None:
    """Where the time of one forward and backward goes, kernel by kernel."""
    for width, length, causal in (
        (64, 512, False),
        (64, 1024, False),
        (64, 8192, False),
        (64, 1024, True),
        (128, 1024, False),
    ):
        if time.perf_counter() > deadline:
            return
        q, k, v, vector, grad_out = _inputs(width, length)
        with recording(run=True) as recorded:
            attention(q, k, v, bias=RelativeBias(vector), causal=causal, backend="triton").backward(grad_out)
        parts = []
        for one in recorded:
            name = one.kernel.fn.__name__.removesuffix("_kernel")
            took = seconds(one.run)
            results.add(f"D{width} L{length}{' causal' if causal else ''}", name, "kernel time", took, "s")
            parts.append(f"{name} {np.median(took) * 1e6:.0f}")
        print(f"D{width} L{length}{' causal' if causal else ''} us: {'  '.join(parts)}", flush=True)


def speed(results: Results, deadline: float) -> None:
    """Forward and backward TFLOP/s: with a T5 bias, without, causal, cross; SDPA with a dense bias; flash without one."""
    print(f"{'TFLOP/s':24} {'forward':>8} {'backward':>8} {'peak GB':>8}")
    for width in (64, 128):
        for length in (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (False, True):
                case = f"D{width} L{length}{' causal' if causal else ''}"
                for provider, setup in _providers(width, length, causal).items():
                    if time.perf_counter() > deadline:
                        return
                    _measure(results, case, provider, setup, width, length, 0.5 if causal else 1.0)


Setup = Callable[..., tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]


def _providers(width: int, length: int, causal: bool) -> dict[str, Setup]:
    """Each makes, of q, k, v and the bias vector, a call and the tensors whose gradients it owes."""

    def ours(q, k, v, vector):  # type: ignore[no-untyped-def]
        return partial(_attend, q, k, v, vector, causal), [q, k, v, vector]

    def ours_without_bias(q, k, v, vector):  # type: ignore[no-untyped-def]
        return partial(_attend, q, k, v, None, causal), [q, k, v]

    def plain(backend, q, k, v, vector):  # type: ignore[no-untyped-def]
        def call():  # type: ignore[no-untyped-def]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)

        return call, [q, k, v]

    def dense(learned, q, k, v, vector):  # type: ignore[no-untyped-def]
        bias = RelativeBias(vector.detach()).dense(length, length).to(TYPE).requires_grad_(learned)
        expanded = bias.expand(q.shape[0], -1, -1, -1)
        call = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=expanded, scale=1.0)
        return call, [q, k, v, bias] if learned else [q, k, v]

    found: dict[str, Setup] = {"fat5 bias": ours, "fat5 no bias": ours_without_bias}
    found["sdpa flash"] = partial(plain, SDPBackend.FLASH_ATTENTION)
    if not causal:
        found |= {"sdpa cudnn": partial(plain, SDPBackend.CUDNN_ATTENTION)} if length in (1024, 4096) else {}
        # The L x L bias of 16k positions in 32 heads takes 17 GB, its gradient as much again.
        found |= {"sdpa learned bias": partial(dense, True)} if length <= 8192 else {}
        found |= {"sdpa fixed bias": partial(dense, False)} if length in (1024, 4096) else {}
    return found


def _attend(q, k, v, vector, causal):  # type: ignore[no-untyped-def]
    bias = None if vector is None else RelativeBias(vector)
    return attention(q, k, v, bias=bias, causal=causal, backend="triton")


def _measure(results: Results, case: str, provider: str, setup: Setup, width: int, length: int, share: float) -> None:
    try:
        q, k, v, vector, grad_out = _inputs(width, length)
        call, leaves = setup(q, k, v, vector)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(call(), leaves, grad_out)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        _rates(results, case, provider, call, leaves, grad_out, TOKENS * length * WIDTH * share / 1e12)
    except Exception as failure:
        print(f"{case:18} {provider:18} {type(failure).__name__} {str(failure)[:110]!r}", flush=True)
        return
    results.add(case, provider, "peak memory", peak, "GB")
    print(f" {peak:8.2f} GB", flush=True)


def _rates(results, case, provider, call, leaves, grad_out, teraflops) -> None:  # type: ignore[no-untyped-def]
    """Forward, and backward as the difference of both and forward, so that both can be replayed as one graph."""
    forward = seconds(call)
    both = seconds(lambda: torch.autograd.grad(call(), leaves, grad_out))
    backward = both - np.median(forward)
    rates = {"forward": FLOPS["forward"] * teraflops / forward, "backward": FLOPS["backward"] * teraflops / backward}
    for metric, rate in rates.items():
        results.add(case, provider, metric, rate, "TFLOP/s")
    print(
        f"{case:18} {provider:22} {np.median(rates['forward']):8.0f} {np.median(rates['backward']):8.0f}",
        end="",
        flush=True,
    )


def packed(results: Results, deadline: float) -> None:
    """16,384 tokens of documents of 50 to 1,024 tokens, packed; against flash's varlen without a bias."""
    generator = np.random.default_rng(0)
    for width in (64, 128):
        lengths: list[int] = []
        while sum(lengths) < TOKENS:
            lengths.append(int(generator.integers(50, 1025)))
        lengths[-1] -= sum(lengths) - TOKENS
        starts = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cuda")
        heads, longest = WIDTH // width, max(lengths)
        q, k, v, grad_out = (
            (torch.randn(TOKENS, heads, width, device="cuda") * 0.5).to(TYPE).requires_grad_() for _ in range(4)
        )
        vector = torch.randn(heads, 2 * REACH + 1, device="cuda", requires_grad=True)
        fixed = {
            "cu_seqlens_q": starts,
            "cu_seqlens_k": starts,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
            "backend": "triton",
        }
        flops = sum(n * n for n in lengths) * WIDTH / 1e12
        providers: dict[str, tuple[Callable, list, float]] = {}
        for causal in (False, True):
            share, tail = (0.5, " causal") if causal else (1.0, "")
            biased = partial(attention, q, k, v, bias=RelativeBias(vector), causal=causal, **fixed)
            providers[f"fat5 bias{tail}"] = (biased, [q, k, v, vector], share)
            providers[f"fat5 no bias{tail}"] = (partial(attention, q, k, v, causal=causal, **fixed), [q, k, v], share)
            try:
                from torch.nn.attention.varlen import varlen_attn

                # torch 2.11 says is_causal, later ones a window.
                old = "is_causal" in signature(varlen_attn).parameters
                how = {"is_causal": causal} if old else {"window_size": (-1, 0 if causal else -1)}
                flash = partial(varlen_attn, q, k, v, starts, starts, longest, longest, **how)
                providers[f"flash varlen{tail}"] = (flash, [q, k, v], share)
            except ImportError:
                pass
        for provider, (call, leaves, share) in providers.items():
            if time.perf_counter() > deadline:
                return
            try:
                _rates(results, f"packed D{width}", provider, call, leaves, grad_out, flops * share)
                print(flush=True)
            except Exception as failure:
                print(f"packed D{width} {provider}: {type(failure).__name__} {str(failure)[:110]!r}")


def flex(results: Results, deadline: float) -> None:
    """FlexAttention, compiled: reading the dense bias, and looking the distance up in a captured vector."""
    from torch.nn.attention.flex_attention import flex_attention

    for width, length in ((64, 1024), (64, 4096), (128, 1024)):
        compiled = torch.compile(flex_attention, dynamic=False)

        def by_distance(q, k, v, vector):  # type: ignore[no-untyped-def]
            def add(score, b, h, i, j):  # type: ignore[no-untyped-def]
                return score + vector[h, (j - i).clamp(-REACH, REACH) + REACH]

            return partial(compiled, q, k, v, score_mod=add, scale=1.0), [q, k, v, vector]  # noqa: B023

        def by_matrix(q, k, v, vector):  # type: ignore[no-untyped-def]
            dense = RelativeBias(vector.detach()).dense(length, length)[0].to(TYPE).requires_grad_()  # noqa: B023

            def add(score, b, h, i, j):  # type: ignore[no-untyped-def]
                return score + dense[h, i, j]

            return partial(compiled, q, k, v, score_mod=add, scale=1.0), [q, k, v, dense]  # noqa: B023

        for provider, setup in (("flex learned vector", by_distance), ("flex learned matrix", by_matrix)):
            if time.perf_counter() > deadline - 45:
                return
            _measure(results, f"D{width} L{length}", provider, setup, width, length, 1.0)


SECTIONS = {
    "ceilings": ceilings,
    "tests": tests,
    "tune": tune,
    "breakdown": breakdown,
    "speed": speed,
    "packed": packed,
    "flex": flex,
}

if __name__ == "__main__":
    main()
