"""`fat5 bench kernels --static | --autotune`: what the kernels were compiled to, or the best configurations for this
GPU."""

import os
import sys
import time
from importlib.util import find_spec
from typing import Any

from fat5.errors import ConfigurationError
from fat5.files import naming

# Between two lines of progress, in a run that takes minutes.
TELL_SECONDS = 30.0


def bench(
    what: list[str] | None = None,
    static: bool = False,
    autotune: bool = False,
    architectures: list[int] | None = None,
    quick: bool = False,
    only: list[str] | None = None,
    workers: int = 0,
    seconds: float = 300.0,
) -> int:
    """Compile every kernel ahead of time, or tune those of attention.

    Args:
        what: `kernels`.
        static: compile every shipped configuration (no GPU needed); exit code 1 where one spills or does not fit.
        autotune: measure every candidate on this GPU and keep the best in the launch table of your cache folder
            ($FAT5_CACHE, else ~/.cache/fat5), which later runs read.
        architectures: for static: 10 * major + minor of the compute capabilities; all known ones when left out.
        quick: for static: attention with a learned bias in bfloat16, and the fused kernels at the sizes of base.
        only: for static: compile the lines that have all of these words, such as `query_gradient 128 float32 dense`.
        workers: for static: processes; one a core when 0.
        seconds: for autotune: no measurement starts after this long.
    """
    if what != ["kernels"] or static == autotune:
        raise ConfigurationError("say what to do", hint="fat5 bench kernels --static, or fat5 bench kernels --autotune")
    if workers < 0:
        raise ConfigurationError(f"workers {workers} is negative", hint="0 means one a core")
    if find_spec("triton") is None:
        raise ConfigurationError("the triton package is not installed", hint="pip install 'fat5[gpu]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigurationError("TRITON_INTERPRET=1 is set, which compiles nothing", hint="Unset it")
    return _static(architectures, quick, only or [], workers) if static else _autotune(seconds)


def _static(architectures: list[int] | None, quick: bool, only: list[str], workers: int) -> int:
    from fat5.bench.static_report.report import LIMITS, report

    architectures = architectures or list(LIMITS)
    unknown = [arch for arch in architectures if arch not in LIMITS]
    if unknown:
        known = ", ".join(map(str, LIMITS))
        raise ConfigurationError(f"no limits are known of sm_{unknown[0]}", where="architectures", hint=f"Of {known}")
    start = time.perf_counter()
    print(
        f"arch   {'kernel':17}{'width':>8} {'dtype':9}{'problem':44} tile, warps, stages  registers  spill "
        " shared KB (limit)  occupancy  matrix instructions  GFLOP    MB  roofline us"
    )
    rows, told = [], start
    for share, found in report(architectures, quick, workers, only):
        rows += found
        for row in found:
            print(_line(row), flush=True)
        now = time.perf_counter()
        if now - told > TELL_SECONDS and share < 1 and not only:  # a part is short, and unevenly spread
            told = now
            left = (now - start) * (1 - share) / share / 60
            print(f"{share:.0%} done, {left:,.0f} min left", file=sys.stderr, flush=True)
    if not rows:
        raise ConfigurationError(
            f"no kernel has all of the words {' '.join(only)}", where="only", hint="Those of a line of the report"
        )
    faults = sum(bool(row.fault) for row in rows)
    print(f"{len(rows)} kernels compiled in {time.perf_counter() - start:.0f} s, {faults} at fault")
    return 1 if faults else 0


def _line(row: Any) -> str:
    from fat5.bench.static_report.report import LIMITS

    kernel, width, dtype, *label = row.words()
    launch = "-" if row.launch is None else "{}x{}, {}, {}".format(*row.launch)
    head = f"sm_{row.arch:<4}{kernel:17}{width:>8} {dtype:9}{' '.join(label):44} {launch:>19}"
    tail = f"  <- {row.fault}" if row.fault else ""
    if row.found is None:
        return head + tail
    found = row.found
    used = next((f"{n} {name}" for name in ("wgmma", "tcgen05", "mma") if (n := getattr(found, name))), "-")
    shared = f"{found.shared_bytes / 1024:.0f} ({LIMITS[row.arch].shared_a_block >> 10})"
    return (
        f"{head} {found.registers:10} {found.stack_bytes:6} {shared:>18} {row.occupancy():10.0%} "
        f"{used:>20} {row.flops() / 1e9:6.0f} {row.bytes() / 1e6:5.0f} "
        f"{row.roofline() * 1e6:12.0f}{tail}"
    )


def _autotune(seconds: float) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ConfigurationError(
            "tuning measures on a GPU, and PyTorch sees none here", hint="`fat5 bench kernels --static` needs none"
        )
    from fat5.bench.tuning import tune, write_table
    from fat5.ops.attention.triton.configuration import user_table

    table = user_table()
    # Asked before the minutes of measuring.
    with naming(table):
        table.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(table.parent, os.W_OK):
        raise ConfigurationError(
            "the tuned rows cannot be written here", where=str(table), hint="Set FAT5_CACHE to a folder of yours"
        )
    counts = tune(time.perf_counter() + seconds, note=print)
    write_table(table)
    print(f"{counts['tuned']} rows measured, {counts['left']} left as they were; wrote {table}")
    return 0


def main(argv: list[str]) -> int:
    """Runs the verb."""
    from fat5.cli.parsing import parse

    return bench(**parse(bench, argv, "bench", words="what"))
