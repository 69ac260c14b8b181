"""scripts/static_table.py on rows of which none was compiled."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fat5.bench.static_report.compile import Resources
from fat5.bench.static_report.problems import FusedProblem, Problem
from fat5.bench.static_report.report import LIMITS, Row
from fat5.ops.triton.launch import Launch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import static_table

# 128 registers, nothing on the stack, 64 KB, 128 threads, eight wgmma.
FITTING = Resources(128, 0, 64 << 10, 128, 8, 0, 0, 0)
CAUSAL = Problem(64, torch.bfloat16, "relative", causal=True)
NORM = FusedProblem("rms_norm", 768, torch.float32)
ROWS = [
    *(Row(arch, "forward", CAUSAL, Launch(64, 64, 4, 3), FITTING) for arch in LIMITS),
    Row(90, "forward", CAUSAL._replace(bias="dense"), Launch(64, 64, 4, 3), FITTING._replace(stack_bytes=8)),
    Row(80, "rms_norm_backward", NORM, Launch(2, 1024, 4, 1), FITTING._replace(stack_bytes=16, spills_in_loops=3)),
    Row(90, "rms_norm_backward", NORM, Launch(2, 1024, 4, 1), FITTING._replace(stack_bytes=24, registers=72)),
]
PAGE = "before\n<!-- static:begin (by a script) -->\nold\n<!-- static:end -->\nafter\n"


def test_page_keeps_what_is_around_the_part() -> None:
    page = static_table.render(PAGE, ROWS)
    assert page.startswith("before\n<!-- static:begin (by a script) -->\nFrom `fat5 bench kernels --static`")
    assert page.endswith("|\n<!-- static:end -->\nafter\n")
    assert "old" not in page
    assert f"{len(ROWS)} kernels compiled" in page
    with pytest.raises(SystemExit, match="found 0"):
        static_table.render("no part", ROWS)


def test_tables_by_hand() -> None:
    # Two products of half of 16,384 x 1,024 x 2,048 at 989 TFLOP/s; four tensors of 16,384 x 2,048 numbers.
    assert static_table.attention(ROWS).splitlines()[2:] == [
        "| forward, causal | 64 | 64×64, 4, 3 | 128 | 0 | 64 | 19% | 8 | 69 | 268 | 69 |"
    ]
    lines = static_table.architectures(ROWS).splitlines()[2:]
    assert lines[0] == "| sm_80 | 2 | 128 | 1 | 64 | 163 |"
    assert lines[3] == "| sm_90 | 3 | 128 | 2 | 64 | 227 |"
    assert static_table.spilling(ROWS).splitlines()[2:] == [
        "| forward | 64 | bfloat16 | dense causal packed |  |  |  | 8 |  |",
        "| rms norm backward | 768 | float32 | rms_norm | 16 (3) |  |  | 24 |  |",
    ]
