"""What the compiler makes of the shipped kernels, without a GPU, in processes of their own: this one interprets."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fat5.bench.static_report.compile import Resources, spills_in_loops
from fat5.bench.static_report.problems import FusedProblem, Problem, launches
from fat5.bench.static_report.report import LIMITS, Row, fault, shipped
from fat5.ops.attention.triton import backward as triton_backward
from fat5.ops.attention.triton import bias_gradient as triton_bias_gradient
from fat5.ops.attention.triton import forward as triton_forward
from fat5.ops.attention.triton import tiles as triton_tiles
from fat5.ops.attention.triton.configuration import ARCHITECTURES, KERNELS, band_configuration, table_row
from fat5.ops.attention.triton.launch_table import DEFAULTS, DENSE, DROPOUT, TUNED
from fat5.ops.choice import COMPILED_ON_CUDA
from fat5.ops.triton import adamw_scale as triton_adamw_scale
from fat5.ops.triton import cross_entropy as triton_cross_entropy
from fat5.ops.triton import few_rows as triton_few_rows
from fat5.ops.triton import geglu as triton_geglu
from fat5.ops.triton import rms_norm as triton_rms_norm
from fat5.ops.triton import rotary as triton_rotary
from fat5.ops.triton.launch import Launch, assumed_architecture

FUSED_MODULES = (
    triton_adamw_scale, triton_cross_entropy, triton_few_rows, triton_geglu, triton_rms_norm, triton_rotary,
)  # fmt: skip
ATTENTION = ("work_list", "forward", "query_gradient", "key_gradient", "band", "diagonal", "bins")
FUSED_KERNELS = (
    "rms_norm_forward", "rms_norm_backward", "geglu_forward", "geglu_backward", "rotary", "cross_entropy",
    "square_sum", "rate", "adamw_scale", "project", "attend_token", "choose",
)  # fmt: skip
CAUSAL = Problem(64, torch.bfloat16, "relative", causal=True)
FITTING = Resources(128, 0, 64 << 10, 128, 8, 0, 0, 0)


def bench(*words: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fat5.cli.main", "bench", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ptxas comes in Triton's Linux wheel")
@pytest.mark.parametrize("architectures", [(90,), pytest.param(ARCHITECTURES, marks=pytest.mark.slow)], ids=len)
def test_learned_bias_and_fused_kernels(architectures: tuple[int, ...]) -> None:
    words = ["--quick", "--workers", "1", "--architectures", *map(str, architectures)]
    done = bench("kernels", "--static", *words)
    assert done.returncode == 0, faulty(done)
    lines = done.stdout.splitlines()
    for arch in architectures:
        kernels = {line.split()[1] for line in lines if line.startswith(f"sm_{arch} ")}
        assert kernels >= {*ATTENTION, *FUSED_KERNELS}, arch
    # Four kernels multiply matrices, for two head dimensions, bidirectional and causal.
    multiplying = [line.split()[1] for line in lines if line.startswith("sm_90 ") and " wgmma " in line]
    assert sum(kernel in ATTENTION for kernel in multiplying) == 16


@pytest.mark.slow
def test_every_configuration_on_every_architecture() -> None:
    done = bench("kernels", "--static")
    assert done.returncode == 0, faulty(done)


def faulty(done: subprocess.CompletedProcess) -> str:
    return "\n".join(line for line in done.stdout.splitlines() if "<-" in line) + done.stderr


def test_the_report_holds_every_kernel_and_operation() -> None:
    """Whatever jit functions the rooms of kernels launch, some problem of the report launches too."""
    launched = {f"{one.name}_kernel" for problem in shipped() for one in launches(problem)}
    assert launched == {
        name
        for module in (triton_forward, triton_backward, triton_bias_gradient, triton_tiles, *FUSED_MODULES)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert {problem.operation for problem in shipped() if isinstance(problem, FusedProblem)} == set(COMPILED_ON_CUDA)
    attention = [problem for problem in shipped() if isinstance(problem, Problem)]
    assert {problem.bias for problem in attention if problem.dropout_p} == {"relative", "dense", "none"}


@pytest.mark.parametrize(
    ("arch", "found", "said"),
    [
        (90, FITTING, ""),
        (90, FITTING._replace(stack_bytes=8, spills_in_loops=1), "spills 8 bytes a thread, 1 instructions in loops"),
        (80, FITTING._replace(stack_bytes=16), ""),
        (80, FITTING._replace(stack_bytes=24), "spills 24 bytes a thread, 0 instructions in loops"),
        (86, FITTING._replace(shared_bytes=100 << 10), "shared memory 102400 over 101376"),
        (90, FITTING._replace(wgmma=0, mma=64), "no wgmma"),
        (80, FITTING._replace(wgmma=0, mma=64), ""),
        (80, FITTING._replace(wgmma=0), "no matrix instruction"),
        (100, FITTING._replace(stack_bytes=32, spills_in_loops=2), ""),
        (100, FITTING._replace(stack_bytes=32, spills_in_loops=2, registers=240), "spills 32 bytes"),
        (100, FITTING._replace(stack_bytes=40), "spills 40 bytes"),
    ],
)
def test_faults_are_named(arch: int, found: Resources, said: str) -> None:
    assert fault(arch, "forward", CAUSAL, found).startswith(said)
    assert bool(fault(arch, "forward", CAUSAL, found)) == bool(said)


def test_spills_are_sought_between_a_branch_back_and_its_target() -> None:
    code = """
        /*0080*/                   STL [R1], R3 ;                        /* 0x0000000301007387 */
        /*0090*/                   LDL R3, [R1] ;                        /* 0x0000000001037983 */
        /*00a0*/              @!P4 BRA 0xd0 ;                            /* 0x0000000000047947 */
        /*00b0*/                   STL.64 [R1+0x8], R2 ;                 /* 0x0000080201007387 */
        /*00c0*/              @!P1 BRA 0x90 ;                            /* 0x0000000000097947 */
        /*00d0*/                   LDL.LU R5, [R1+0x8] ;                 /* 0x0000080001057983 */
        /*00e0*/                   BRA 0xe0;                             /* 0xfffffff000007947 */
    """
    assert spills_in_loops(code) == 2
    assert spills_in_loops(code.replace("@!P1 BRA 0x90", "BRA.U !UP0, 0xb0")) == 1
    assert spills_in_loops(code.replace("BRA 0x90", "BRA 0xd0")) == 4, "no loop: the table cannot tell"


def test_faults_of_a_fused_kernel() -> None:
    problem, plain = FusedProblem("rms_norm", 768, torch.bfloat16), FITTING._replace(wgmma=0)
    assert not fault(90, "rms_norm_forward", problem, plain)
    assert fault(90, "rms_norm_forward", problem, plain._replace(stack_bytes=24)).startswith("spills 24")
    assert fault(86, "rms_norm_forward", problem, plain._replace(shared_bytes=100 << 10)).startswith("shared memory")


def test_bytes_of_fused_kernels_by_hand() -> None:
    def moved(operation: str, kernel: str, width: int, flags: str = "") -> float:
        return Row(90, kernel, FusedProblem(operation, width, torch.bfloat16), None, FITTING, "", flags).bytes()

    assert moved("rms_norm", "rms_norm_forward", 768) == 2 * 16384 * 768 * 2
    assert moved("linear_cross_entropy", "cross_entropy", 32768, "gradient") == 2 * 16384 * 32768 * 2
    assert moved("linear_cross_entropy", "cross_entropy", 32768) == 16384 * 32768 * 2
    # Weights in and out, gradients in, two fp32 moments in and out, compensations in and out.
    assert moved("adamw_scale", "adamw_scale", 768) == pytest.approx(305_184_000 * (4 + 2 + 16 + 4))


def test_occupancy_and_roofline_by_hand() -> None:
    # 128 registers a thread and 128 threads: four blocks by registers, three by 65 KB each of 228 KB: 384 of 2,048
    # threads.
    row = Row(90, "forward", Problem(64, torch.bfloat16, "none"), Launch(64, 64, 4, 3), FITTING, "")
    assert row.occupancy() == 384 / 2048
    # Two products of 16,384 x 1,024 x 2,048, at 989 TFLOP/s.
    assert row.flops() == 4 * 16384 * 1024 * 2048
    assert row.roofline() == pytest.approx(4 * 16384 * 1024 * 2048 / 989e12)


def test_every_architecture_and_size_has_a_row() -> None:
    assert set(LIMITS) == set(ARCHITECTURES)
    for kernel in KERNELS:
        for head_dim in (1, 64, 65, 128):
            for size in (2, 4):
                # 75 and 120 are of no table: they get the row that fits everywhere.
                for arch in (*ARCHITECTURES, 0, 75, 120):
                    assert min(table_row(kernel, arch, head_dim, size)) >= 1
                    assert min(table_row(kernel, arch, head_dim, size, dropout=True, dense=True)) >= 1
    assert table_row("query_gradient", 90, 64, 2, dropout=True) == DROPOUT["query_gradient", 90, 64, 2]
    assert table_row("query_gradient", 80, 64, 2, dropout=True) == DEFAULTS["query_gradient", 64, 2]
    assert table_row("query_gradient", 80, 64, 2, dense=True) == DENSE["query_gradient", 0, 64, 2]
    assert table_row("query_gradient", 90, 64, 2, dense=True) == TUNED["query_gradient", 90, 64, 2]
    assert table_row("forward", 80, 64, 2, dropout=True, dense=True) == DROPOUT["forward", 0, 64, 2]
    # A row of its own for sm_90 comes before the tuned one, dropout's before both.
    assert table_row("query_gradient", 90, 128, 2, dense=True) == DENSE["query_gradient", 90, 128, 2]
    assert table_row("query_gradient", 90, 128, 2, True, dense=True) == DROPOUT["query_gradient", 90, 128, 2]
    assert table_row("key_gradient", 100, 64, 4, dense=True) == DENSE["key_gradient", 100, 64, 4]
    assert table_row("key_gradient", 80, 64, 4, dense=True) == DEFAULTS["key_gradient", 64, 4]
    assert table_row("band", 80, 64, 2, dense=True) == DEFAULTS["band", 64, 2]
    sides = [side for table in (DEFAULTS, DENSE, DROPOUT, TUNED) for row in table.values() for side in row[:2]]
    assert all(side & (side - 1) == 0 for side in sides), "tiles have sides that are powers of two"


@pytest.mark.parametrize(
    ("arch", "width", "launch"),
    [
        (86, 1024, Launch(1, 1024, 4, 1)),
        (89, 1024, Launch(1, 1024, 4, 1)),
        (90, 1024, Launch(2, 1024, 4, 1)),
        (120, 1024, Launch(2, 1024, 4, 1)),
        (86, 512, Launch(2, 512, 4, 1)),
        (86, 4096, Launch(1, 4096, 16, 1)),
        (90, 4096, Launch(1, 4096, 16, 1)),
    ],
)
def test_norms_backward_takes_half_the_tile_on_sm_86_and_sm_89(arch: int, width: int, launch: Launch) -> None:
    with assumed_architecture(arch):
        forward, backward = launches(FusedProblem("rms_norm", width, torch.bfloat16))
    assert backward.launch == launch
    with assumed_architecture(90):
        assert launches(FusedProblem("rms_norm", width, torch.bfloat16))[0].launch == forward.launch


def test_band_tile_is_cut_to_the_query_gradient_tile() -> None:
    cut = band_configuration(torch.device("cpu"), 64, torch.bfloat16, Launch(16, 32, 4, 1))
    assert (cut.block_m, cut.block_n) == (16, 16)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ptxas comes in Triton's Linux wheel")
def test_a_part_of_the_report() -> None:
    words = ("kernels", "--static", "--quick", "--architectures", "80", "90", "--only")
    done = bench(*words, "rms_norm_forward", "768")
    assert [line.split()[:3] for line in done.stdout.splitlines()[1:-1]] == [
        [arch, "rms_norm_forward", "768"] for arch in ("sm_80", "sm_90")
    ]
    done = bench(*words, "rms_norm_forward", "769")
    assert done.returncode == 2
    assert "no kernel has all of the words rms_norm_forward 769" in done.stderr


def test_command_says_what_it_needs() -> None:
    if not torch.cuda.is_available():
        done = bench("kernels", "--autotune")
        assert done.returncode == 2
        assert "PyTorch sees none" in done.stderr
    done = bench("kernels")
    assert done.returncode == 2
    assert "--static" in done.stderr
