"""How every benchmark here measures: providers interleaved (A B A B) in one run, medians with p20 and p80, one CSV."""

import csv
import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent.parent / "bench"
"""Results of this checkout, not part of it; `scripts/publish.py` takes them over into benchmarks/results/."""
GENERATIONS = {("25", "1"): "7003 (Zen 3)", ("25", "17"): "9004 (Zen 4)", ("26", "2"): "9005 (Zen 5)"}
"""Server processors of AMD by (family, model)."""
FIELDS = [
    "case",
    "provider",
    "metric",
    "p20",
    "p50",
    "p80",
    "unit",
    "repeats",
    "machine",
    "versions",
    "commit",
    "date",
    "command",
]


def interleaved(
    providers: Mapping[str, Callable[[], object]], repeats: int = 7, warmup: int = 1
) -> dict[str, np.ndarray]:
    """Seconds of each provider over `repeats` rounds; each round runs every provider once, in turn."""
    for _ in range(warmup):
        for run in providers.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, run in providers.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def row(case: str, provider: str, metric: str, samples: np.ndarray, unit: str) -> dict[str, object]:
    """One CSV row from samples of one quantity (`unit` says which: "s", "tokens/s", "bytes", "ratio")."""
    p20, p50, p80 = (float(f"{value:.5g}") for value in np.percentile(samples, [20, 50, 80]))
    return {
        "case": case,
        "provider": provider,
        "metric": metric,
        "p20": p20,
        "p50": p50,
        "p80": p80,
        "unit": unit,
        "repeats": len(samples),
    }


def save(question: str, rows: list[dict[str, object]]) -> Path:
    """Writes bench/QUESTION.csv (replacing it) with machine, versions, commit and command, and prints a table."""
    path = RESULTS / f"{question}.csv"
    path.parent.mkdir(exist_ok=True)
    stamped = stamp()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(row | stamped for row in rows)
    for line in rows:
        name = f"{line['case']!s:32} {line['provider']!s:28} {line['metric']!s:20}"
        print(f"{name} {line['p50']:>12,} {line['unit']} (p20 {line['p20']:,}, p80 {line['p80']:,})")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}")
    return path


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Appends rows to a CSV, stamped as `save` does; processes that run side by side may share the file."""
    stamped = stamp()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, FIELDS)
        if not os.fstat(file.fileno()).st_size:
            writer.writeheader()
        writer.writerows(row | stamped for row in rows)


def stamp() -> dict[str, str]:
    """Where a row comes from: machine, versions, commit, date, command."""
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "command": "python " + " ".join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def machine() -> str:
    """Processor or GPU name and core count."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":")[::2] for line in cpuinfo.read_text().splitlines())
        facts = {key.strip(): value.strip() for key, value in lines}
        model = facts.get("model name", model)
        # A hypervisor may hide the rest of the name.
        generation = GENERATIONS.get((facts.get("cpu family"), facts.get("model")))
        model = f"{model} {generation}" if generation else model
    return f"{model} ({os.cpu_count()} cores)"


def versions() -> str:
    """Versions of what the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"python {platform.python_version()}"]
    for name in ("torch", "triton", "transformers", "tokenizers", "numba", "liger-kernel", "flash-attn"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    """Short hash of HEAD, with + where the tree differs from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "src"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")
