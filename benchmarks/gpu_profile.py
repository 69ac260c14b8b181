"""Where a step's time goes on the device: its kernels by class, from torch.profiler's trace.

A kernel belongs to the op that launched it where that op is cross-entropy or the optimizer, and otherwise to what its
name says. On the CPU, to try the code, an op that calls no other op stands for a kernel.
"""

import json
import re
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CROSS_ENTROPY, OPTIMIZER = "cross-entropy", "optimizer"
GEMM = r"gemm|cutlass|nvjet|cublas|xmma|wgmma|splitk|aten::mm$|aten::addmm$|triton_tem"
# The ranges that own what is launched inside them, by how their name starts.
RANGES = {"fat5::linear_cross_entropy": CROSS_ENTROPY, "Optimizer.step": OPTIMIZER}
# Pattern of a kernel's name, its class; the first that matches counts.
CLASSES = [
    (r"query_gradient_kernel|key_gradient_kernel|hooks(Learning|Biased)Backward", "attention backward"),
    (r"hooksBiasedForward", "attention forward"),
    (r"band_kernel|diagonal_kernel|bins_kernel|dense_gradient|sums_kernel|chunks_kernel", "attention bias gradient"),
    (r"work_list", "attention work list"),
    (r"^_?forward_kernel|flash_fwd|fmha.*fprop|cudnn.*fprop|fat5::attention$", "attention forward"),
    (r"flash_bwd|fmha.*bprop|mem_efficient.*back|attention_backward", "attention backward"),
    (r"efficient_attention|fmha_cutlass|scaled_dot", "attention forward"),
    (GEMM, "GEMM"),
    (r"cross_entropy|softmax|nll_loss", CROSS_ENTROPY),
    (r"embedding|index_put|indexing_backward|sort|index_select|gather|scatter", "embedding, indexing"),
    (r"multi_tensor|lpnorm", "gradient norm and clip"),
    (r"^triton_|rms_norm|geglu", "norm, elementwise (fused)"),
    (r"memcpy|memset|copy_", "copy"),
    (r"elementwise|reduce|at::native|aten::|fat5::", "elementwise (not fused)"),
]
IDLE = "idle"
SYNCHRONIZING = re.compile(r"Synchronize|^cudaMemcpy$|^cudaFree$|^cudaMalloc$|cudaHostAlloc")


@dataclass
class Kernel:
    name: str
    kind: str
    start: float
    microseconds: float


@dataclass
class Profile:
    """One step: milliseconds by class, idle included; the kernels; calls of the host that wait for the device."""

    milliseconds: float
    classes: dict[str, float]
    kernels: list[Kernel]
    waits: Counter[str]

    def text(self, title: str, rows: int = 25) -> str:
        """Tables of classes and of the kernels that take most."""
        launches = Counter(kernel.kind for kernel in self.kernels)
        lines = [f"{title}: {self.milliseconds:.2f} ms, {len(self.kernels)} kernels"]
        for kind, taken in sorted(self.classes.items(), key=lambda item: -item[1]):
            lines.append(f"  {taken:9.2f} ms {taken / self.milliseconds:6.1%} {launches[kind]:5} x  {kind}")
        waits = ", ".join(f"{name} x{count}" for name, count in self.waits.most_common(6))
        lines.append(f"  host waits or allocates (one cudaDeviceSynchronize is the profiler's): {waits or 'never'}")
        total: Counter[tuple[str, str]] = Counter()
        count: Counter[tuple[str, str]] = Counter()
        for kernel in self.kernels:
            total[kernel.kind, kernel.name] += kernel.microseconds  # type: ignore[assignment]
            count[kernel.kind, kernel.name] += 1
        for (kind, name), taken in total.most_common(rows):
            calls = count[kind, name]
            lines.append(f"  {taken / 1e3:9.2f} ms {calls:5} x {taken / calls:9.1f} us  {kind:26} {name[:110]}")
        return "\n".join(lines)


def profile_step(step: Callable[[], object], synchronize: Callable[[], None]) -> Profile:
    """Profiles one call of `step`; two calls before it warm up the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        step()
        synchronize()
        with torch.profiler.profile(activities=activities) as found:
            step()
            synchronize()
            with torch.profiler.record_function("fat5.profiled_step"):
                step()
                synchronize()
        found.export_chrome_trace(str(trace))
        return read_trace(json.loads(trace.read_text())["traceEvents"])


def read_trace(events: list[dict[str, Any]]) -> Profile:
    """What happened inside the range fat5.profiled_step."""
    events = [event for event in events if event.get("ph") == "X"]
    whole = next(e for e in events if e["name"] == "fat5.profiled_step" and not e.get("cat", "").startswith("gpu"))
    first, last = whole["ts"], whole["ts"] + whole["dur"]
    inside = [e for e in events if first <= e["ts"] <= last and e is not whole]
    owners = _owners(inside)
    launches = {
        e["args"]["correlation"]: e
        for e in inside
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    device = [e for e in inside if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = [
        _kernel(e, owners(launch["ts"]) if (launch := launches.get(e.get("args", {}).get("correlation"))) else None)
        for e in device or _leaves(inside)
    ]
    kernels.sort(key=lambda kernel: kernel.start)
    classes: dict[str, float] = {}
    for kernel in kernels:
        classes[kernel.kind] = classes.get(kernel.kind, 0.0) + kernel.microseconds / 1e3
    begin, end, busy, reached = first, first, 0.0, 0.0
    if kernels:
        # From the first kernel to the last, and what the host spent outside of both counts as idle.
        begin = reached = kernels[0].start
        for kernel in kernels:
            stop = kernel.start + kernel.microseconds
            busy += max(0.0, stop - max(kernel.start, reached))
            reached = max(reached, stop)
        end = reached
    classes[IDLE] = max(0.0, end - begin - busy) / 1e3
    waits = Counter(
        e["name"] for e in inside if e.get("cat") in ("cuda_runtime", "cuda_driver") and SYNCHRONIZING.search(e["name"])
    )
    return Profile((end - begin) / 1e3, classes, kernels, waits)


def _kernel(event: dict[str, Any], owner: str | None) -> Kernel:
    name = event["name"]
    kind = owner or next((kind for pattern, kind in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")
    if owner == CROSS_ENTROPY and re.search(GEMM, name, re.IGNORECASE):
        kind = "cross-entropy GEMM"
    return Kernel(name, kind, event["ts"], event["dur"])


def _owners(events: list[dict[str, Any]]) -> Callable[[float], str | None]:
    """The class of the range that a moment lies in, on any thread: only one thread launches at a time."""
    ranges = sorted(
        (e["ts"], e["ts"] + e["dur"], kind)
        for e in events
        for start, kind in RANGES.items()
        if e["name"].startswith(start) and e.get("cat") in ("cpu_op", "user_annotation")
    )
    starts = [begin for begin, _, _ in ranges]

    def owner(moment: float) -> str | None:
        at = bisect_right(starts, moment) - 1
        return ranges[at][2] if at >= 0 and moment <= ranges[at][1] else None

    return owner


def _leaves(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """CPU ops that call no other."""
    ops = sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    return [
        op
        for op, following in zip(ops, [*ops[1:], None])
        if following is None or following["tid"] != op["tid"] or following["ts"] >= op["ts"] + op["dur"]
    ]
