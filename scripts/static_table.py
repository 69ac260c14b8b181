"""Writes the static table of docs/kernels.md: what the compiler made of every shipped kernel, no GPU needed.

    python scripts/static_table.py

It runs the report of `fat5 bench kernels --static`, which Triton's cache makes short a second time. The part between
`<!-- static:begin … -->` and `<!-- static:end -->` is replaced; nothing there is typed by hand. With a kernel at fault
the page stays as it is, and the exit code is 1.
"""

import datetime
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from fat5.bench.static_report.report import LIMITS, Row, report

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
MULTIPLYING = ("forward", "query_gradient", "key_gradient", "band")
LABELS = {"relative packed": "", "relative causal packed": ", causal"}
"""Problems of the first table, as they stand behind the kernel's name."""


def main() -> int:
    rows: list[Row] = []
    for share, found in report():
        rows += found
        print(f"{share:.0%} done", file=sys.stderr)
    faults = [row for row in rows if row.fault]
    for row in faults:
        print(f"sm_{row.arch} {' '.join(row.words())}: {row.fault}", file=sys.stderr)
    if not faults:
        PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 1 if faults else 0


def render(page: str, rows: Sequence[Row]) -> str:
    """The page with its part written anew from the rows of a whole report."""
    head = (
        f"From `fat5 bench kernels --static` with Triton {version('triton')}, {datetime.date.today()}: {len(rows):,} "
        "kernels compiled, none at fault.\nOperations, bytes and roofline time are those of 16,384 tokens in documents "
        f"of 1,024, heads × head dimension = 2,048, on an {LIMITS[90].card}."
    )
    spills = "Bytes of stack a thread, and in parentheses the instructions in a kernel's loops that touch local memory:"
    content = "\n\n".join((head, attention(rows), architectures(rows), spills, spilling(rows)))
    pattern = r"(<!-- static:begin[^>]*-->\n).*?(<!-- static:end -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"expected one part 'static' on the page, found {count}")
    return page


def attention(rows: Iterable[Row]) -> str:
    """Attention's kernels as training uses them, on sm_90."""
    cells = []
    for row in rows:
        label = row.problem.label()
        if row.arch != 90 or row.kernel not in MULTIPLYING or label not in LABELS or _dtype(row) != "bfloat16":
            continue
        found, launch = row.found, row.launch
        assert found is not None
        assert launch is not None
        cells.append([
            row.kernel.replace("_", " ") + LABELS[label], row.problem.width,
            "{}×{}, {}, {}".format(*launch), found.registers, found.stack_bytes, f"{found.shared_bytes / 1024:.0f}",
            f"{row.occupancy():.0%}", found.wgmma, f"{row.flops() / 1e9:.0f}", f"{row.bytes() / 1e6:.0f}",
            f"{row.roofline() * 1e6:.0f}",
        ])  # fmt: skip
    heading = (
        "kernel, learned bias, packed, bf16, sm_90", "D", "tile, warps, stages", "registers", "stack",
        f"shared, KB of {LIMITS[90].shared_a_block >> 10}", "occupancy", "wgmma", "GFLOP", "MB", "roofline, µs",
    )  # fmt: skip
    return _table(heading, cells)


def architectures(rows: Iterable[Row]) -> str:
    """Each architecture's kernels in one line."""
    cells = []
    for arch, limits in LIMITS.items():
        found = [row.found for row in rows if row.arch == arch and row.found is not None]
        cells.append([
            f"sm_{arch}", len(found), max(one.registers for one in found), sum(one.stack_bytes > 0 for one in found),
            f"{max(one.shared_bytes for one in found) / 1024:.0f}", limits.shared_a_block >> 10,
        ])  # fmt: skip
    return _table(("architecture", "kernels", "most registers", "with stack", "most shared memory, KB", "of"), cells)


def spilling(rows: Iterable[Row]) -> str:
    """Kernels with a stack, by architecture."""
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        if row.found is not None and row.found.stack_bytes:
            loops = f" ({row.found.spills_in_loops})" if row.found.spills_in_loops else ""
            problem = " ".join([row.problem.label(), row.flags]).strip()
            key = (row.kernel.replace("_", " "), str(row.problem.width), _dtype(row), problem)
            cells.setdefault(key, {})[row.arch] = f"{row.found.stack_bytes}{loops}"
    lines = [[*key, *(by.get(arch, "") for arch in LIMITS)] for key, by in cells.items()]
    return _table(("kernel", "width", "dtype", "problem", *(f"sm_{arch}" for arch in LIMITS)), lines)


def _dtype(row: Row) -> str:
    return str(row.problem.dtype).removeprefix("torch.")


def _table(heading: Sequence[str], cells: Iterable[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
