"""The kernels on a GPU: errors first; attention, its configurations and its speed against SDPA, FlexAttention, flash;
the fused operations (gpu_fused.py); the kernel tests.

    PYTHONPATH=src python3 benchmarks/gpu_attention.py --output_dir results [--seconds 530] [--sections tune,speed]

Runs unattended: a section that fails says so and the next one goes on. What `tune` finds is used by the sections after
it, and written to OUTPUT_DIR/launch_table.json. Sizes follow the papers: 16,384 tokens a call and heads * head_dim =
2,048. TFLOP/s count 4 * Lq * Lk * D a head forward and 10 backward, half of that when causal.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fat5.bench.static_report.problems import Problem
from fat5.bench.timing import seconds
from fat5.bench.tuning import REACH, TOKENS, TYPE, WIDTH, Job, inputs, precompile, tune, write_table
from fat5.ops import RelativeBias, attention
from fat5.ops.attention.triton.configuration import KERNELS, configuration
from fat5.ops.attention.triton.launch_table import Row
from fat5.ops.triton.launch import Launch, architecture, recording
from gpu_measure import Results, Setup, run_sections

ROOT = Path(__file__).resolve().parent.parent
LEGEND = "provider forward/backward TFLOP/s, peak GB beyond the inputs, share of a matrix product's rate over both"


def main() -> None:
    run_sections("gpu_attention", __doc__, 530.0, SECTIONS)


def check(results: Results, deadline: float) -> None:
    """Errors against float64 over those of plain PyTorch in bfloat16, of the output and of the worst gradient: 2 and 3
    are allowed.
    """
    for width in (64, 128):
        for causal, packed in ((False, False), (True, False), (False, True)):
            if time.perf_counter() > deadline:
                return
            rows = [(torch.randn(1000, 4, width, device="cuda") * 0.5).to(TYPE) for _ in range(4)]
            vector = torch.randn(4, 2 * REACH + 1, device="cuda")
            starts = torch.tensor([0, 413, 413, 1000] if packed else [0, 1000], dtype=torch.int32, device="cuda")
            how: dict = {f"cu_seqlens_{side}": starts for side in "qk"} | {f"max_seqlen_{side}": 1000 for side in "qk"}
            calls = {
                "exact": (torch.float64, partial(attention, causal=causal, backend="reference", **how)),
                "plain": (TYPE, partial(_written_out, starts, causal)),
                "ours": (TYPE, partial(attention, causal=causal, backend="triton", **how)),
            }
            found = {name: _results(call, rows, vector, dtype) for name, (dtype, call) in calls.items()}
            ratios = [
                ((got.double() - want).norm() / ((mild.double() - want).norm() + 1e-6 * want.norm())).item()
                for got, mild, want in zip(found["ours"], found["plain"], found["exact"], strict=True)
            ]
            worst = ratios[0], max(ratios[1:])
            case = f"check D{width}{' causal' if causal else ''}{' documents' if packed else ''}"
            results.add(case, "fat5 bias", "error over plain, output", worst[0], "ratio")
            results.add(case, "fat5 bias", "error over plain, gradient", worst[1], "ratio")
            print(
                f"{case}: {worst[0]:.2f}/{worst[1]:.2f}{'' if worst[0] <= 2 and worst[1] <= 3 else ' WRONG'}",
                flush=True,
            )


def _results(call: Callable, rows: list[torch.Tensor], vector: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and the gradients of q, k, v and the bias's vector."""
    q, k, v = (x.to(dtype).requires_grad_() for x in rows[:3])
    leaf = vector.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    out = call(q, k, v, bias=RelativeBias(leaf))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, leaf), rows[3].to(dtype))]


def _written_out(starts, causal, q, k, v, bias):  # type: ignore[no-untyped-def]
    """What one would write in plain PyTorch, in the precision of q."""
    length = len(q)
    document = torch.bucketize(torch.arange(length, device=q.device), starts, right=True)
    hidden = document[:, None] != document
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) + bias.dense(length, length)[0].to(q.dtype)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def ceilings(results: Results, deadline: float) -> None:
    """What this card gives a large matrix product and a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=TYPE) for _ in range(2))
    rate = 2 * 8192**3 / seconds(lambda: a @ b) / 1e12
    source, target = (torch.empty(2**31, device="cuda", dtype=torch.uint8).random_() for _ in range(2))
    bandwidth = 2 * 2**31 / seconds(lambda: target.copy_(source)) / 1e12
    results.ceiling = float(np.median(rate))
    results.add("ceiling", "torch", "bf16 matrix product", rate, "TFLOP/s")
    results.add("ceiling", "torch", "copy", bandwidth, "TB/s")
    print(f"matrix product {np.median(rate):.0f} TFLOP/s, copy {np.median(bandwidth):.2f} TB/s")


def configurations(results: Results, deadline: float) -> None:
    """`fat5 bench kernels --autotune`, with the new table beside the results and in use from here on."""

    def measured(case: str, row: Row, taken: np.ndarray) -> None:
        results.add(case, "x".join(map(str, row)), "time", taken, "s")

    try:
        print(tune(deadline, measured, partial(print, flush=True)))
    finally:
        table = results.path.with_name("launch_table.json")
        write_table(table)
        print(table.read_text())


def speed(results: Results, deadline: float) -> None:
    """With a T5 bias, without, causal; SDPA with a dense bias; flash without one."""
    jobs = [
        Job(Problem(width, TYPE, bias, causal, packed), _in_use(width))
        for width in (64, 128)
        for bias in ("relative", "none")
        for causal in (False, True)
        for packed in (False, True)
    ]
    precompile(jobs, architecture(torch.device("cuda")), deadline)
    print(f"compiled ({results.elapsed():.0f} s); {LEGEND}", flush=True)
    for length in (1024, 512, 2048, 4096, 8192, 16384):
        for width in (64, 128):
            for causal in (False, True):
                case = f"D{width} L{length}{' causal' if causal else ''}"
                flops = TOKENS * length * WIDTH * (0.5 if causal else 1.0) / 1e12
                results.line(case, _providers(width, length, causal), flops, deadline)


def _in_use(width: int) -> dict[str, Launch]:
    return {kernel: configuration(kernel, torch.device("cuda"), width, TYPE) for kernel in KERNELS}


def _providers(width: int, length: int, causal: bool) -> dict[str, Setup]:
    """Ours with and without a bias, flash, and for some lengths the dense ways."""
    found: dict[str, Setup] = {
        "fat5 bias": partial(_ours, width, length, length, causal, True),
        "fat5 no bias": partial(_ours, width, length, length, causal, False),
        "sdpa flash": partial(_plain, SDPBackend.FLASH_ATTENTION, width, length, length, causal),
    }
    if find_spec("flash_attn") is not None:
        found["flash-attn"] = partial(_flash, width, length, causal)
    if not causal:
        if length in (1024, 4096):
            found["sdpa cudnn"] = partial(_plain, SDPBackend.CUDNN_ATTENTION, width, length, length, causal)
            found["sdpa fixed bias"] = partial(_dense, width, length, False)
        # The L x L bias of 16k positions in 32 heads takes 17 GB, its gradient as much again.
        if length <= 8192:
            found["sdpa learned bias"] = partial(_dense, width, length, True)
    return found


def _ours(width, length, key_length, causal, biased, backend="triton"):  # type: ignore[no-untyped-def]
    q, k, v, vector, grad_out = inputs(width, length, key_length)
    bias = RelativeBias(vector) if biased else None
    call = partial(attention, q, k, v, bias=bias, causal=causal, backend=backend)
    return call, [q, k, v, vector] if biased else [q, k, v], grad_out


def _plain(backend, width, length, key_length, causal):  # type: ignore[no-untyped-def]
    q, k, v, _, grad_out = inputs(width, length, key_length)

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)

    return call, [q, k, v], grad_out


def _flash(width, length, causal):  # type: ignore[no-untyped-def]
    from flash_attn import flash_attn_func

    # Its layout is (batch, length, heads, head_dim), which ours is in memory.
    q, k, v, _, grad_out = inputs(width, length)

    def call() -> torch.Tensor:
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(*rows, softmax_scale=1.0, causal=causal).transpose(1, 2)

    return call, [q, k, v], grad_out


def _dense(width, length, learned):  # type: ignore[no-untyped-def]
    q, k, v, vector, grad_out = inputs(width, length)
    bias = RelativeBias(vector.detach()).dense(length, length).to(TYPE).requires_grad_(learned)
    expanded = bias.expand(q.shape[0], -1, -1, -1)
    call = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=expanded, scale=1.0)
    return call, [q, k, v, bias] if learned else [q, k, v], grad_out


def cross(results: Results, deadline: float) -> None:
    """A decoder's look at its encoder: no bias, fewer queries than keys."""
    for width in (64, 128):
        for length, key_length in ((256, 1024), (512, 2048), (1024, 4096)):
            providers: dict[str, Setup] = {
                "fat5": partial(_ours, width, length, key_length, False, False),
                "sdpa flash": partial(_plain, SDPBackend.FLASH_ATTENTION, width, length, key_length, False),
            }
            flops = TOKENS * key_length * WIDTH / 1e12
            results.line(f"D{width} cross {length}x{key_length}", providers, flops, deadline)


def _lengths(longest: int = 1024) -> list[int]:
    """Documents of 50 (24 if they are short) to `longest` tokens, TOKENS in all."""
    shortest = 50 if longest > 500 else 24
    generator = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < TOKENS:
        lengths.append(int(generator.integers(shortest, longest + 1)))
    lengths[-1] -= sum(lengths) - TOKENS
    return lengths


def packed(results: Results, deadline: float) -> None:
    """16,384 tokens of documents of 50 to 1,024 tokens, packed; against flash's varlen without a bias."""
    lengths = _lengths()
    flops = sum(n * n for n in lengths) * WIDTH / 1e12
    for width in (64, 128):
        for causal in (False, True):
            providers: dict[str, Setup] = {
                "fat5 bias": partial(_packed, width, lengths, causal, True),
                "fat5 no bias": partial(_packed, width, lengths, causal, False),
                "flash varlen": partial(_varlen, width, lengths, causal),
            }
            case = f"packed D{width}{' causal' if causal else ''}"
            results.line(case, providers, flops * (0.5 if causal else 1.0), deadline)


def _documents(width, lengths, slots=0):  # type: ignore[no-untyped-def]
    """As a batch of the trainer has them: of fixed shape, with empty documents up to `slots`."""
    ends = np.cumsum([0, *lengths])
    ends = np.append(ends, np.full(max(0, slots - len(lengths)), ends[-1]))
    starts = torch.tensor(ends, dtype=torch.int32, device="cuda")
    shape = (TOKENS, WIDTH // width, width)
    rows = [(torch.randn(shape, device="cuda") * 0.5).to(TYPE).requires_grad_() for _ in range(4)]
    return starts, *rows[:3], rows[3].detach()


def _packed(width, lengths, causal, biased, backend="triton", slots=0):  # type: ignore[no-untyped-def]
    starts, q, k, v, grad_out = _documents(width, lengths, slots)
    vector = torch.randn(WIDTH // width, 2 * REACH + 1, device="cuda", requires_grad=True)
    documents = {f"cu_seqlens_{side}": starts for side in "qk"} | {f"max_seqlen_{side}": max(lengths) for side in "qk"}
    bias = RelativeBias(vector) if biased else None
    call = partial(attention, q, k, v, bias=bias, causal=causal, backend=backend, **documents)
    return call, [q, k, v, vector] if biased else [q, k, v], grad_out


def _varlen(width, lengths, causal):  # type: ignore[no-untyped-def]
    from torch.nn.attention.varlen import varlen_attn

    starts, q, k, v, grad_out = _documents(width, lengths)
    # torch 2.11 says is_causal, later ones a window.
    old = "is_causal" in signature(varlen_attn).parameters
    how = {"is_causal": causal} if old else {"window_size": (-1, 0 if causal else -1)}
    call = partial(varlen_attn, q, k, v, starts, starts, max(lengths), max(lengths), **how)
    return call, [q, k, v], grad_out


def hopper(results: Results, deadline: float) -> None:
    """The hooks in flash-attn-4 beside Triton's kernels, and beside flash-attn-4 itself, which knows no bias."""
    for case in ("D64 L1024", "D64 L1024 causal", "packed D64", "D64 L4096", "D128 L1024", "packed D128", "D64 L512"):
        if time.perf_counter() > deadline:
            return
        width, causal = int(case.split("D")[1].split()[0]), case.endswith("causal")
        if case.startswith("packed"):
            lengths = _lengths()
            ours = partial(_packed, width, lengths, causal)
            theirs = partial(_flash_4_packed, width, lengths, causal)
            flops = sum(n * n for n in lengths) * WIDTH / 1e12
        else:
            length = int(case.split("L")[1].split()[0])
            ours = partial(_ours, width, length, length, causal)
            theirs = partial(_flash_4, width, length, causal)
            flops = TOKENS * length * WIDTH * (0.5 if causal else 1.0) / 1e12
        providers: dict[str, Setup] = {
            "fat5 bias": partial(_on_hopper, ours, True),
            "fat5 bias any order": partial(_on_hopper, ours, True, deterministic=False),
            "fat5 no bias": partial(_on_hopper, ours, False),
            "fat5 no bias any order": partial(_on_hopper, ours, False, deterministic=False),
            "fat5 bias triton": partial(ours, True),
            "fat5 no bias triton": partial(ours, False),
            "fa4 no bias": theirs,
        }
        results.line(case, providers, flops, deadline)


def _on_hopper(ours, biased, deterministic=True):  # type: ignore[no-untyped-def]
    """Unless deterministic, dQ is added up by atomics, in no fixed order, as flash-attn-4 does unless asked."""
    from fat5.ops.attention.hopper import host

    host.DETERMINISTIC = deterministic
    return ours(biased, backend="hopper")


def slots(results: Results, deadline: float) -> None:
    """A batch has a fixed number of documents, of which `fat5 pretrain` leaves about a fifth empty; also with 256."""
    for longest in (1024, 488, 232, 108):
        lengths = _lengths(longest)
        count = len(lengths)
        for causal, biased in ((False, True), (True, True), (False, False)):
            for most in (count, 8 * math.ceil((count + 2.2 * count**0.5) / 8), 256):
                if time.perf_counter() > deadline:
                    return
                ours = partial(_packed, 64, lengths, causal, slots=most)
                flops = sum(n * n for n in lengths) * WIDTH / 1e12 * (0.5 if causal else 1.0)
                providers: dict[str, Setup] = {
                    "fat5 hopper": partial(_on_hopper, ours, biased),
                    "fat5 triton": partial(ours, biased),
                }
                name = f"packed D64 mean {TOKENS // count}{' causal' if causal else ''}{'' if biased else ' no bias'}"
                if count <= most:
                    results.line(f"{name}, {most} slots", providers, flops, deadline)


def _flash_4(width, length, causal):  # type: ignore[no-untyped-def]
    from flash_attn.cute import flash_attn_func

    q, k, v, _, grad_out = inputs(width, length)

    def call() -> torch.Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=1.0, causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call, [q, k, v], grad_out


def _flash_4_packed(width, lengths, causal):  # type: ignore[no-untyped-def]
    from flash_attn.cute import flash_attn_varlen_func

    starts, q, k, v, grad_out = _documents(width, lengths)
    how = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}

    def call() -> torch.Tensor:
        out = flash_attn_varlen_func(q, k, v, softmax_scale=1.0, causal=causal, **how)
        return out[0] if isinstance(out, tuple) else out

    return call, [q, k, v], grad_out


def flex(results: Results, deadline: float) -> None:
    """FlexAttention, compiled: looking the distance up in a captured vector, and reading the dense bias."""
    for width, length in ((64, 1024), (128, 1024), (64, 4096)):
        providers: dict[str, Setup] = {
            "flex learned vector": partial(_flex, width, length, True),
            "flex learned matrix": partial(_flex, width, length, False),
        }
        results.line(f"D{width} L{length}", providers, TOKENS * length * WIDTH / 1e12, deadline)


def _flex(width, length, by_distance):  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, vector, grad_out = inputs(width, length)
    q, k, v = (x.detach().contiguous().requires_grad_() for x in (q, k, v))
    learned = vector if by_distance else RelativeBias(vector.detach()).dense(length, length)[0].to(TYPE)
    learned = learned.detach().requires_grad_()

    def add(score, b, h, i, j):  # type: ignore[no-untyped-def]
        return score + (learned[h, (j - i).clamp(-REACH, REACH) + REACH] if by_distance else learned[h, i, j])

    call = partial(torch.compile(flex_attention, dynamic=False), q, k, v, score_mod=add, scale=1.0)
    return call, [q, k, v, learned], grad_out


def breakdown(results: Results, deadline: float) -> None:
    """Where the time of one forward and backward goes, kernel by kernel."""
    for width in (64, 128):
        for length, causal in ((512, False), (1024, False), (8192, False), (1024, True)):
            if time.perf_counter() > deadline:
                return
            q, k, v, vector, grad_out = inputs(width, length)
            with recording(run=True) as recorded:
                attention(q, k, v, bias=RelativeBias(vector), causal=causal, backend="triton").backward(grad_out)
            case, parts = f"D{width} L{length}{' causal' if causal else ''}", []
            for one in recorded:
                name = one.kernel.fn.__name__.removesuffix("_kernel")
                taken = seconds(one.run, budget=0.03)
                results.add(case, name, "kernel time", taken, "s")
                parts.append(f"{name} {np.median(taken) * 1e6:.0f}")
            print(f"{case} us: {'  '.join(parts)}", flush=True)


def tests(results: Results, deadline: float) -> None:
    """The kernel tests on the device, with xdist, since most of their time is compilation; log in tests.log."""
    workers = str(min(14, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "tests/ops/test_triton_attention.py", "-v", "-n", workers, "--tb=short"]
    command += ["-p", "no:cacheprovider", "-m", "not slow and not gpu", "--maxfail=12"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    log = results.path.with_name("tests.log")
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(max(deadline - time.perf_counter(), 10))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
    lines = log.read_text().splitlines()
    passed, failed = (sum(f" {word} tests/" in line for line in lines) for word in ("PASSED", "FAILED"))
    print("\n".join(line[:160] for line in lines if line.startswith(("FAILED", "ERROR", "E  ")))[:3000])
    print(f"{passed} passed, {failed} failed, {'ended' if process.returncode in (0, 1) else 'stopped: out of time'}")
    results.add("tests", "fat5", "passed", float(passed), "")
    results.add("tests", "fat5", "failed", float(failed), "")


def fused(results: Results, deadline: float) -> None:
    """gpu_fused.py, which writes a file of its own beside this one's."""
    left = deadline - time.perf_counter()
    command = [sys.executable, str(Path(__file__).with_name("gpu_fused.py"))]
    subprocess.run([*command, "--output_dir", str(results.path.parent), "--seconds", f"{left:.0f}"], timeout=left + 30)


# The section and the largest share of all time that it may take.
SECTIONS: dict[str, tuple[Callable[[Results, float], None], float]] = {
    "check": (check, 0.08),
    "ceilings": (ceilings, 0.05),
    "tune": (configurations, 0.35),
    "speed": (speed, 0.35),
    "cross": (cross, 0.08),
    "packed": (packed, 0.08),
    "hopper": (hopper, 0.20),
    "slots": (slots, 0.20),
    "breakdown": (breakdown, 0.06),
    "flex": (flex, 0.20),
    "fused": (fused, 0.22),
    "tests": (tests, 1.0),
}

if __name__ == "__main__":
    main()
