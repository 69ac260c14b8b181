"""The fused operations on a GPU: plain PyTorch, the same compiled, our Triton kernels, Liger's where installed.

    PYTHONPATH=src python3 benchmarks/gpu_fused.py --output_dir results [--seconds 110] [--sections check,loss,tune]

First the errors against float64, then times:
CUDA events around enqueued work, the L2 cache flushed before each round, medians. 16,384 tokens, bfloat16. A line says
for each provider `forward/backward microseconds, share of what this card's copy bandwidth (or matrix product) allows`.
What wins over the compiled form goes into COMPILED_ON_CUDA of fat5/ops/choice.py, tile sizes into the constants of
fat5/ops/triton/.
"""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from fat5.bench.timing import seconds
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.ops import geglu, linear_cross_entropy, rms_norm, rotary, use_kernels
from fat5.ops.geglu import geglu_reference
from fat5.ops.linear_cross_entropy import linear_cross_entropy_reference
from fat5.ops.rms_norm import rms_norm_reference
from fat5.ops.rotary import rotary_reference
from fat5.ops.triton.launch import Launch
from fat5.optim import AdamWScale
from gpu_measure import Results, excused, forward_and_backward, run_sections
from gpu_providers import TYPE, Z_LOSS, candidates, labelled, normal, ours, outputs, plain, tensors, with_liger

TOKENS, VOCABULARY = 16_384, 32_768
WIDTHS = ((512, 2048), (768, 3072), (1024, 4096))
"""d_model and d_ff of small, base and large."""
# Of one measurement; the host's share comes on top.
BUDGET = 0.03


class Case(NamedTuple):
    """One operation at one size: its inputs, its providers, and what a perfect run of it would move or multiply."""

    name: str
    inputs: Callable[[], list[Tensor]]
    providers: dict[str, Callable[..., Any]]
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    flops: float = 0.0
    """Of forward and backward together: the loss computes its gradients in its forward."""


def main() -> None:
    print(f"liger-kernel {version('liger-kernel')}" if find_spec("liger_kernel") else "liger-kernel: not installed")
    run_sections("gpu_fused", __doc__, 110.0, {name: (section, 1.0) for name, section in SECTIONS.items()})


class Ceilings(NamedTuple):
    """What this card gives a large copy (bytes a second, read and written) and a large matrix product (FLOP/s)."""

    bandwidth: float
    flops: float


@lru_cache(maxsize=1)
def ceilings(results: Results) -> Ceilings:
    """Measured once, by the first section that needs them."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=TYPE) for _ in range(2))
    rate = 2 * 8192**3 / seconds(lambda: a @ b, BUDGET)
    source, target = (torch.empty(2**30, device="cuda", dtype=torch.uint8).random_() for _ in range(2))
    bandwidth = 2 * 2**30 / seconds(lambda: target.copy_(source), BUDGET)
    results.add("ceiling", "torch", "bf16 matrix product", rate / 1e12, "TFLOP/s")
    results.add("ceiling", "torch", "copy", bandwidth / 1e12, "TB/s")
    print(f"matrix product {np.median(rate) / 1e12:.0f} TFLOP/s, copy {np.median(bandwidth) / 1e12:.2f} TB/s")
    return Ceilings(float(np.median(bandwidth)), float(np.median(rate)))


def check(results: Results, deadline: float) -> None:
    """Error against float64 over that of plain PyTorch in the same precision, output and worst gradient: 2 and 3 are
    allowed.
    """
    rows, width, labels = 1000, 768, torch.randint(0, 5000, (1000,), device="cuda")
    labels[::7] = -100
    loss = dict(z_loss=0.1, label_smoothing=0.1)
    turned = torch.randn(rows, 32, device="cuda")
    angles = {"cos": turned.cos(), "sin": turned.sin()}
    x, y, scale = (normal(*shape, dtype=torch.float32) for shape in ((rows, width), (rows, width), (width,)))
    weight = normal(5000, width, dtype=torch.float32) * 0.05
    checks: list[tuple[str, list[Tensor], Callable, dict[str, Callable]]] = [
        ("rms_norm", [x, scale], _rms_norm_plain, with_liger(ours(rms_norm), "rms_norm")),
        ("geglu", [4 * x, y], geglu_reference, with_liger(ours(geglu), "geglu")),
        (
            "linear_cross_entropy",
            [x, weight],
            partial(labelled, partial(linear_cross_entropy_reference, **loss), labels),
            {
                "triton": ours(partial(labelled, partial(linear_cross_entropy, chunk_size=256, **loss), labels)),
                "plain": plain(partial(labelled, partial(linear_cross_entropy, chunk_size=256, **loss), labels)),
            },
        ),
        (
            "rotary",
            [x.view(rows, 12, 64)],
            partial(rotary_reference, **angles),
            {"triton": ours(partial(rotary, **angles))},
        ),
    ]
    for name, inputs, reference, providers in checks:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            exact = _results(reference, [t.double() for t in inputs])
            usual = _results(reference, [t.to(dtype) for t in inputs])
            print(f"{name:21} {str(dtype)[6:]:9}", end="")
            for provider, call in providers.items():
                with excused(provider):
                    ratios = _ratios(_results(call, [t.to(dtype) for t in inputs]), usual, exact)
                    count = len(ratios) - len(inputs)
                    forward, gradient = max(ratios[:count]), max(ratios[count:])
                    good = forward <= 2 and gradient <= 3
                    results.add(f"{name} {str(dtype)[6:]}", provider, "error over plain, forward", forward, "ratio")
                    results.add(f"{name} {str(dtype)[6:]}", provider, "error over plain, gradient", gradient, "ratio")
                    print(f"  {provider} {forward:.2f}/{gradient:.2f}{'' if good else ' WRONG'}", end="")
            print(flush=True)
    _check_step(results)


def _check_step(results: Results) -> None:
    """Three optimizer steps: the same errors for weights with their compensation added."""
    torch.manual_seed(0)
    shapes = [(1,), (768,), (300, 70), (1000, 768)]
    weights = [0.3 * torch.randn(shape, device="cuda") for shape in shapes]
    grads = [[torch.randn_like(w) for w in weights] for _ in range(3)]

    def trained(dtype: torch.dtype, rounded: torch.dtype, **how: Any) -> list[Tensor]:
        parameters = [torch.nn.Parameter(w.to(rounded).to(dtype, copy=True)) for w in weights]
        optimizer = AdamWScale(parameters, weight_decay=0.1, **how)
        for step in grads:
            for parameter, grad in zip(parameters, step, strict=True):
                parameter.grad = grad.to(rounded).to(dtype)
            optimizer.step()
        lost = (optimizer.state[p].get("compensation", torch.zeros((), device="cuda")) for p in parameters)
        return [p.detach().double() + c.double() for p, c in zip(parameters, lost, strict=True)]

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        exact = trained(torch.float64, dtype, fused=False)
        usual = trained(dtype, dtype, fused=False)
        use_kernels("triton")
        worst = max(_ratios(trained(dtype, dtype), usual, exact))
        case = f"adamw_scale {str(dtype)[6:]}"
        results.add(case, "triton", "error over plain, forward", worst, "ratio")
        print(f"{'adamw_scale':21} {str(dtype)[6:]:9}  triton {worst:.2f}{'' if worst <= 2 else ' WRONG'}", flush=True)


def _ratios(found: list[Tensor], usual: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Each tensor's error over that of plain PyTorch in the same precision."""
    return [
        ((got.double() - want).norm() / ((mild.double() - want).norm() + 1e-7 * want.norm())).item()
        for got, mild, want in zip(found, usual, exact, strict=True)
    ]


def _results(call: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients for the same upstream in every precision."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = outputs(call(*leaves))
    torch.manual_seed(1)
    upstream = [torch.randn(out.shape, device="cuda", dtype=torch.float32).to(out) for out in outs]
    return [*(out.detach().clone() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]


def norms(results: Results, deadline: float) -> None:
    """RMSNorm of the residual stream."""
    for width, _ in WIDTHS:
        one = TOKENS * width * TYPE.itemsize
        inputs = partial(tensors, (TOKENS, width), (width,))
        providers = with_liger(candidates(rms_norm), "rms_norm")
        _measure(results, Case(f"rms_norm d{width}", inputs, providers, 2 * one, 3 * one), deadline)


def gated(results: Results, deadline: float) -> None:
    """Gated GELU of the feed-forward layer."""
    for _, width in WIDTHS:
        one = TOKENS * width * TYPE.itemsize
        inputs = partial(tensors, (TOKENS, width), (TOKENS, width))
        providers = with_liger(candidates(geglu), "geglu")
        _measure(results, Case(f"geglu ff{width}", inputs, providers, 3 * one, 5 * one), deadline)


def turned(results: Results, deadline: float) -> None:
    """Rotary embedding of queries and keys of width 64."""
    for width, _ in WIDTHS:
        angles = torch.randn(TOKENS, 32, device="cuda")
        cos, sin = angles.cos(), angles.sin()

        def both(q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> tuple[Tensor, Tensor]:
            return rotary(q, cos, sin), rotary(k, cos, sin)

        one = TOKENS * width * TYPE.itemsize
        shape = (TOKENS, width // 64, 64)
        providers = with_liger(candidates(both), "rotary", angles=(cos, sin))
        case = Case(f"rotary d{width}", partial(tensors, shape, shape), providers, 4 * one, 4 * one)
        _measure(results, case, deadline)


def optimizer(results: Results, deadline: float) -> None:
    """A step of all weights of fat5-base: device time, and the host's time to enqueue it. Bytes count each tensor
    once: weights, moments and compensations in and out, gradients in.
    """
    with torch.device("meta"):
        shapes = [p.shape for p in FAT5ForConditionalGeneration(FAT5Config.preset("fat5-base")).parameters()]
    elements = sum(shape.numel() for shape in shapes)
    for dtype, moved in ((torch.float32, 28), (torch.bfloat16, 26)):
        name = f"adamw_scale {str(dtype)[6:]} {elements / 1e6:.0f}M"
        print(f"{name:26}", end="", flush=True)
        providers: dict[str, tuple[str, Callable]] = {
            "torch AdamW fused": ("plain", partial(torch.optim.AdamW, fused=True)),
            "plain": ("plain", AdamWScale),
            "triton": ("triton", AdamWScale),
        }
        for provider, (setting, make) in providers.items():
            if time.perf_counter() > deadline:
                print("  out of time", end="")
                break
            with excused(provider):
                use_kernels(setting)
                parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in shapes]
                for parameter in parameters:
                    parameter.grad = torch.randn_like(parameter)
                own = make(parameters, lr=1e-3)
                own.step()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before, start = torch.cuda.memory_allocated(), time.perf_counter()
                own.step()
                host = time.perf_counter() - start
                torch.cuda.synchronize()
                peak = (torch.cuda.max_memory_allocated() - before) / 1e9
                taken = seconds(own.step, 3 * BUDGET)
                share = moved * elements / taken / ceilings(results).bandwidth
                results.add(name, provider, "step", taken, "s")
                results.add(name, provider, "host", host, "s")
                results.add(name, provider, "bandwidth", moved * elements / taken / 1e9, "GB/s")
                results.add(name, provider, "share of roofline", share, "ratio")
                results.add(name, provider, "peak memory", peak, "GB")
                times = f"{np.median(taken) * 1e6:.0f} (host {host * 1e6:.0f}) {np.median(share):.0%} {peak:.2f} GB"
                print(f"  {provider} {times}", end="", flush=True)
            own = parameters = None
        print(flush=True)


def loss(results: Results, deadline: float) -> None:
    """The output projection and its cross-entropy: with whole logits, in chunks of plain PyTorch, in chunks with our
    kernel (by rows a chunk), Liger's. The share is of a bare matrix product's rate, over forward and backward.
    """
    for width, _ in (WIDTHS[1], WIDTHS[0], WIDTHS[2]):
        labels = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")

        def by(call: Callable, labels: Tensor = labels, **options: Any) -> Callable:
            return partial(labelled, partial(call, z_loss=Z_LOSS, **options), labels)

        providers: dict[str, Callable] = {
            "whole logits": by(linear_cross_entropy_reference),
            "whole logits compiled": torch.compile(by(linear_cross_entropy_reference), dynamic=False),
            "chunks plain": plain(by(linear_cross_entropy)),
            "triton": ours(by(linear_cross_entropy)),
        }
        if width == 768:
            for rows in (512, 1024, 2048, 8192, 16384):
                providers[f"triton {rows} rows"] = ours(by(linear_cross_entropy, chunk_size=rows))
        providers = with_liger(providers, "linear_cross_entropy", labels)
        inputs = partial(_loss_inputs, width)
        case = Case(f"linear_cross_entropy d{width}", inputs, providers, flops=6.0 * TOKENS * width * VOCABULARY)
        _measure(results, case, deadline)


def tune(results: Results, deadline: float) -> None:
    """Tile sizes of our kernels at the sizes of base: microseconds forward/backward for each."""
    from fat5.ops.triton import cross_entropy as triton_cross_entropy
    from fat5.ops.triton import geglu as triton_geglu
    from fat5.ops.triton import rms_norm as triton_rms_norm
    from fat5.ops.triton import rotary as triton_rotary

    labels = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")
    lce = partial(labelled, partial(linear_cross_entropy, z_loss=Z_LOSS), labels)
    angles = torch.randn(TOKENS, 32, device="cuda")
    turn = partial(rotary, cos=angles.cos(), sin=angles.sin())
    trials: list[tuple[str, Callable, Callable, Any, dict[str, tuple]]] = [
        ("linear_cross_entropy", lce, partial(_loss_inputs, 768), triton_cross_entropy,
         {"BLOCK": (4096, 2048, 8192, 16384), "WARPS": (8, 4, 16)}),
        ("rms_norm", rms_norm, partial(tensors, (TOKENS, 768), (768,)), triton_rms_norm,
         {"FORWARD_TILE": (1024, 2048, 4096, 8192), "WARPS": (4, 8)}),
        ("rms_norm", rms_norm, partial(tensors, (TOKENS, 768), (768,)), triton_rms_norm,
         {"BACKWARD_TILE": (1024, 2048, 4096), "PROGRAMS_A_PROCESSOR": (2, 4, 8), "WARPS": (4, 8)}),
        ("geglu", geglu, partial(tensors, (TOKENS, 3072), (TOKENS, 3072)), triton_geglu,
         {"LAUNCH": tuple(Launch(1, n, w, 1) for n in (512, 1024, 2048, 4096) for w in (4, 8))}),
        ("rotary", turn, partial(tensors, (TOKENS, 12, 64)), triton_rotary,
         {"TILE": (512, 1024, 2048), "WARPS": (4, 8)}),
    ]  # fmt: skip
    for name, call, inputs, module, constants in trials:
        for choice in product(*constants.values()):
            values = dict(zip(constants, choice))
            if time.perf_counter() > deadline:
                print("out of time")
                return
            label = " ".join(f"{key} {value if np.isscalar(value) else value[1:3]}" for key, value in values.items())
            print(f"{name:21}", end="")
            tiles = patch.dict(triton_rms_norm.BACKWARD_TILES, clear=True)
            with excused(label), tiles, patch.multiple(module, **values):
                taken, _ = _taken(ours(call), inputs())
                results.add(f"tune {name}", label, "forward", taken[:, 0], "s")
                results.add(f"tune {name}", label, "backward", taken[:, 1], "s")
                forward, backward = np.median(taken, axis=0) * 1e6
                print(f"  {label} {forward:.0f}/{backward:.0f}", end="")
            print(flush=True)


def _measure(results: Results, case: Case, deadline: float) -> None:
    print(f"{case.name:26}", end="", flush=True)
    for provider, call in case.providers.items():
        if time.perf_counter() > deadline:
            print("  out of time", end="")
            break
        with excused(provider):
            _measure_provider(results, case, provider, call)
    print(flush=True)


def _measure_provider(results: Results, case: Case, provider: str, call: Callable) -> None:
    taken, peak = _taken(call, case.inputs())
    stages = {"forward": taken[:, 0], "backward": taken[:, 1], "both": taken.sum(1)}
    for stage, values in stages.items():
        results.add(case.name, provider, stage, values, "s")
    results.add(case.name, provider, "peak memory", peak, "GB")
    for stage, moved in (("forward", case.forward_bytes), ("backward", case.backward_bytes)):
        if moved:
            results.add(case.name, provider, f"{stage} bandwidth", moved / stages[stage] / 1e9, "GB/s")
    if case.flops:
        share = case.flops / stages["both"] / ceilings(results).flops
        results.add(case.name, provider, "rate", case.flops / stages["both"] / 1e12, "TFLOP/s")
    else:
        share = (case.forward_bytes + case.backward_bytes) / stages["both"] / ceilings(results).bandwidth
    results.add(case.name, provider, "share of roofline", share, "ratio")
    times = "/".join(f"{np.median(stages[stage]) * 1e6:.0f}" for stage in ("forward", "backward"))
    memory = f" {peak:.2f} GB" if case.flops else ""
    print(f"  {provider} {times} {np.median(share):.0%}{memory}", end="", flush=True)


def _taken(call: Callable, inputs: list[Tensor]) -> tuple[np.ndarray, float]:
    leaves = [x.requires_grad_() for x in inputs]
    # Compiled before it is measured.
    outs = outputs(call(*leaves))
    upstream = [torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in outs]
    torch.autograd.grad(outs, leaves, upstream)
    del outs
    return forward_and_backward(lambda: outputs(call(*leaves)), leaves, upstream, BUDGET)


def _loss_inputs(width: int) -> list[Tensor]:
    return [normal(TOKENS, width), normal(VOCABULARY, width) * width**-0.5]


def _rms_norm_plain(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, 1e-6)


SECTIONS = {
    "check": check,
    "norms": norms,
    "gated": gated,
    "loss": loss,
    "optimizer": optimizer,
    "rotary": turned,
    "tune": tune,
}

if __name__ == "__main__":
    main()
