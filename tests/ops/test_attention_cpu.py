"""What only the CPU path has: blocks of keys, threads, vector widths, and numbers that are not numbers."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest
import torch
from problems import assert_as_good_as_plain, make

from fat5.ops import attention
from fat5.ops.attention.cpu import kernels
from fat5.ops.attention.cpu import threads as cpu_threads


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("bias", ["none", "vector", "dense"])
def test_several_blocks_of_keys(bias, causal):
    """Beyond one block of keys, backward has the forward's log-sum-exp and output instead of whole rows."""
    assert_as_good_as_plain(make(600, 1100, bias=bias, causal=causal, heads=2), "cpu")


def test_long_sums_lose_no_more_than_a_library_s():
    """dK and dV are sums over all queries, the output over all keys: of blocks, added one to another."""
    problem = make(2048, 2048, heads=1, head_dim=64, scale=0.125)
    exact, plain = problem.run("reference", torch.float64), problem.run("reference", torch.float32)
    for name, want, mild, got in zip(("out", "dq", "dk", "dv"), exact, plain, problem.run("cpu", torch.float32)):
        # As one running sum: 2.3 to 2.6 for out, dk and dv.
        ratio = ((got.double() - want).norm() / (mild.double() - want).norm()).item()
        assert ratio < 2.0, f"{name}: {ratio:.2f} times plain PyTorch's error"


@pytest.mark.parametrize("length", [300, 700])
def test_dropout_in_several_blocks(length):
    problem = make(130, length, dropout_p=0.25, heads=2)

    def run(backend: str) -> list[torch.Tensor]:
        torch.manual_seed(11)
        return problem.run(backend, torch.float32)

    for want, got in zip(run("reference"), run("cpu")):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own_threads", [False, True], ids=["team", "python"])
@pytest.mark.parametrize("bias", ["vector", "dense"])
def test_threads_change_no_bit(bias, own_threads, monkeypatch):
    if own_threads:
        monkeypatch.setattr(cpu_threads, "_team", lambda: None)
    problem = make(300, 300, bias=bias, layout="packed")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = problem.run("cpu", torch.float32)
        torch.set_num_threads(4)
        together = problem.run("cpu", torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_not_a_number_stays_one(which, bad):
    """A broken activation must reach the loss, where the trainer looks for it."""
    inputs = [torch.randn(1, 1, 40, 16) for _ in range(3)]
    inputs[which][0, 0, 33, 5] = bad
    got, want = (attention(*inputs, backend=backend).isfinite() for backend in ("cpu", "reference"))
    assert torch.equal(got, want)
    assert not got.all() or which == 1  # a key of minus infinity is only a key that nobody sees


WIDTHS = """
import sys, llvmlite.binding, numba
sys.path.insert(0, sys.argv[1])
from problems import assert_as_good_as_plain, make
of_this_processor = llvmlite.binding.get_host_cpu_features
class Narrow:
    get, flatten = {FEATURES}.get, of_this_processor().flatten
llvmlite.binding.get_host_cpu_features = Narrow
from fat5.ops.attention.cpu import kernels
llvmlite.binding.get_host_cpu_features = of_this_processor
assert kernels.WIDTH == {WIDTH}
for head_dim in (8, 64, 80):
    for layout in ("packed", "holes"):
        assert_as_good_as_plain(make(127, 65, head_dim=head_dim, layout=layout, causal=True), "cpu")
"""


PLAIN_PROCESSOR = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


@pytest.mark.slow  # each compiles every kernel
@pytest.mark.parametrize(
    ("features", "width", "target"),
    [
        pytest.param({"avx2": True}, 8, {}, id="avx2"),
        pytest.param({}, 4, {}, id="arm"),
        pytest.param({}, 4, PLAIN_PROCESSOR, id="no fused multiply-add"),
    ],
)
def test_other_processors(features, width, target, tmp_path):
    """The block shapes and instructions of other processors, run on this one."""
    code = WIDTHS.replace("{FEATURES}", repr(features)).replace("{WIDTH}", str(width))
    here = str(Path(__file__).parent)
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path), **target}
    subprocess.run([sys.executable, "-c", code, here], check=True, env=environment, timeout=300)


HASHES = """
import hashlib, torch
from fat5.ops import RelativeBias, attention
torch.set_num_threads(1)
torch.manual_seed(0)
found = hashlib.sha256()
for length in (37, 131):
    q, k, v = (torch.randn(1, 2, length, 16).requires_grad_() for _ in range(3))
    table = torch.randn(32, 2).requires_grad_()
    bias = RelativeBias.from_table(table, bidirectional=True, max_distance=128)
    out = attention(q, k, v, bias=bias, backend="cpu")
    for x in (out, *torch.autograd.grad(out, [q, k, v, table], torch.randn_like(out))):
        found.update(x.detach().numpy().tobytes())
print(found.hexdigest())
"""


@pytest.mark.slow  # compiles everything once
def test_code_from_the_cache_computes_the_same_bits(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", HASHES]
    compiled, loaded = (subprocess.check_output(command, env=environment, text=True) for _ in range(2))
    assert list(tmp_path.rglob("*.nbc"))
    assert compiled == loaded


def test_no_kernel_lets_the_compiler_reorder_sums():
    compiled = [x for x in vars(kernels).values() if isinstance(x, numba.core.dispatcher.Dispatcher)]
    assert len(compiled) > 20
    assert not any(x.targetoptions.get("fastmath") for x in compiled)
