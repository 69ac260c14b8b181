"""Hardware counters of the attention kernels (Nsight Compute), then memcheck and racecheck (compute-sanitizer).

    PYTHONPATH=src python3 benchmarks/gpu_counters.py --output_dir results

Unattended, under four minutes: a tool that is missing, fails or takes too long says so and the next one goes on.
Writes OUTPUT_DIR/gpu_counters.csv (case, kernel, metric, value, unit). Clocks are left as they are. `--toy` runs the
calls themselves, without the tools, on whatever device there is.
"""

import argparse
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from fat5.ops import RelativeBias, attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = ("forward", "query_gradient", "key_gradient", "band")
"""In the order of their launch."""
CASES = [("D64 L1024", 1024, False), ("D64 L8192", 8192, False), ("D64 L1024 causal", 1024, True)]
TOKENS, WIDTH, HEAD_DIM, REACH = 16384, 2048, 64, 91
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
# A metric whose name holds all these words, and what it is called here.
WANTED = [
    (("gpu__time_duration.sum",), "duration"),
    (("sm__pipe_tensor_cycles_active.avg", "pct_of_peak_sustained_active"), "tensor pipe"),
    (("sm__throughput.avg", "pct"), "SM throughput"),
    (("sm__inst_executed.avg.per_cycle_active",), "instructions a cycle"),
    (("gpu__dram_throughput.avg", "pct"), "DRAM throughput"),
    (("dram__bytes.sum", "per_second"), "DRAM bandwidth"),
    (("lts__t_sector_hit_rate",), "L2 hit rate"),
    (("l1tex__t_sector_hit_rate",), "L1 hit rate"),
    (("l1tex__throughput.avg", "pct"), "L1 throughput"),
    (("lts__throughput.avg", "pct"), "L2 throughput"),
    (("sm__warps_active.avg", "pct"), "occupancy"),
    (("sm__maximum_warps_per_active_cycle_pct",), "occupancy at best"),
    (("launch__registers_per_thread",), "registers"),
    (("launch__shared_mem_per_block_driver",), "shared memory of the driver"),
    (("launch__shared_mem_per_block_static",), "shared memory, static"),
    (("launch__shared_mem_per_block_dynamic",), "shared memory, dynamic"),
    (("launch__waves_per_multiprocessor",), "waves"),
    (("smsp__issue_active.avg", "pct"), "issue slots"),
]
STALL, ENDING = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
MOST_STALLS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("bench"))
    parser.add_argument("--workload", choices=("counters", "small"), help="what the tools run")
    parser.add_argument("--tools", default="ncu,memcheck,racecheck", help="which, in order")
    parser.add_argument("--toy", action="store_true", help="only the calls, small")
    options = parser.parse_args()
    if options.workload or options.toy:
        for name in [options.workload] if options.workload else ("counters", "small"):
            {"counters": counters, "small": small}[name](options.toy)
            print(f"ran {name}", flush=True)
        return
    options.output_dir.mkdir(parents=True, exist_ok=True)
    log = options.output_dir / "ncu.csv"
    sections = [part for section in (*SECTIONS, "WarpStateStats") for part in ("--section", section)]
    names = "|".join(f"^{kernel}_kernel" for kernel in KERNELS)
    profiled = ["--profile-from-start", "off", "--kernel-name", f"regex:{names}", "--csv", "--page", "raw"]
    tools = options.tools.split(",")
    if "ncu" in tools:
        run_tool("ncu", ["--clock-control", "none", *profiled, *sections, "--log-file", str(log)], "counters", 110)
    if log.exists():
        rows = read_counters(log.read_text(errors="replace"))
        write(options.output_dir / "gpu_counters.csv", rows)
        log.unlink()
    checks = ["--report-api-errors", "no", "--print-limit", "10", "--error-exitcode", "9"]
    for tool in [tool for tool in tools if tool != "ncu"]:
        run_tool("compute-sanitizer", ["--tool", tool, *checks], "small", 60)


def run_tool(program: str, arguments: Sequence[str], workload: str, limit: float) -> None:
    """Runs this file's `workload` under a tool; prints the end of what it said."""
    elsewhere = sorted(Path("/opt/nvidia").glob(f"**/{program}")) if Path("/opt/nvidia").exists() else []
    found = shutil.which(program) or next(map(str, elsewhere), None)
    if found is None:
        print(f"{program}: not here", flush=True)
        return
    command = [found, *arguments, sys.executable, __file__, "--workload", workload]
    # Without the caching allocator each tensor is an allocation of its own, so that a step beyond it is seen.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if program == "compute-sanitizer" else {})
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        said += f"\nstopped after {limit} s"
    end = "\n".join(said.splitlines()[-12:])
    which = " ".join(arguments[:2])
    print(f"== {program} {which}: {process.returncode} in {time.perf_counter() - started:.0f} s\n{end}", flush=True)


def counters(toy: bool) -> None:
    """Each case once to compile, then once under the profiler."""
    tokens, width = (256, 128) if toy else (TOKENS, WIDTH)
    calls = []
    for _, length, causal in CASES:
        length = min(length, 128) if toy else length
        q, k, v, grad = (_normal(tokens // length, width // HEAD_DIM, length, HEAD_DIM) for _ in range(4))
        vector = torch.randn(width // HEAD_DIM, 2 * REACH + 1, device=DEVICE, requires_grad=True)
        calls.append((q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), vector, grad, causal))
    for profiled in (False, True):
        if profiled and DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for q, k, v, vector, grad, causal in calls:
            attention(q, k, v, bias=RelativeBias(vector), causal=causal).backward(grad)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def small(toy: bool) -> None:
    """Rows and packed documents, with lengths that divide nothing; every result is finite."""
    for length, causal in ((200, False), (77, True)):
        q, k, v, grad = (_normal(2, 2, length, HEAD_DIM) for _ in range(4))
        _check([q, k, v], grad, causal, {})
    starts = torch.tensor([0, 1, 70, 70, 198], dtype=torch.int32, device=DEVICE)
    longest = max(int(after - before) for before, after in pairwise(starts.tolist()))
    q, k, v, grad = (_normal(200, 2, HEAD_DIM) for _ in range(4))
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    for causal in (False, True):
        _check([q, k, v], grad, causal, packed)


def _check(inputs: list[torch.Tensor], grad: torch.Tensor, causal: bool, packed: dict) -> None:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    vector = torch.randn(2, 2 * REACH + 1, device=DEVICE, requires_grad=True)
    out = attention(*leaves, bias=RelativeBias(vector), causal=causal, **packed)
    out.backward(grad)
    for x in (out, vector.grad, *(leaf.grad for leaf in leaves)):
        assert x is not None
        assert bool(torch.isfinite(x.cpu()).all())


def _normal(*shape: int) -> torch.Tensor:
    return (0.5 * torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))).to(
        DEVICE, torch.bfloat16
    )


def read_counters(log: str) -> list[dict[str, str]]:
    """Rows of the wanted metrics from what `ncu --csv --page raw` wrote: a header, a line of units, a line a launch."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    table = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if len(table) < 2:
        print("ncu measured no kernel:\n" + log[-1500:], flush=True)
        return []
    units, *launches = table
    rows, number = [], -1
    for launch in launches:
        kernel = launch["Kernel Name"].removesuffix("_kernel")
        number += kernel == KERNELS[0]
        case = CASES[number][0]
        found = [
            (name, launch[metric], units[metric])
            for words, name in WANTED
            for metric in launch
            if all(word in metric for word in words)
        ]
        stalls = [m for m in launch if m.startswith(STALL) and m.endswith(ENDING) and "not_issued" not in m]
        stalls.sort(key=lambda m: -_number(launch[m]))
        found += [
            (f"stalled: {m.removeprefix(STALL).removesuffix(ENDING)}", launch[m], units[m])
            for m in stalls[:MOST_STALLS]
        ]
        rows += [
            {"case": case, "kernel": kernel, "metric": name, "value": value, "unit": unit}
            for name, value, unit in found
        ]
    return rows


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """The CSV, and one line a kernel on the screen."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "kernel", "metric", "value", "unit"])
        writer.writeheader()
        writer.writerows(rows)
    for case, kernel in dict.fromkeys((row["case"], row["kernel"]) for row in rows):
        own = [row for row in rows if (row["case"], row["kernel"]) == (case, kernel)]
        said = ", ".join(f"{row['metric'][-60:]} {row['value']} {row['unit']}" for row in own)
        print(f"{case} {kernel}: {said}", flush=True)


if __name__ == "__main__":
    main()
