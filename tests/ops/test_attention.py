"""Attention's reference, its CPU path, and the cross-checks, against float64 and against each other."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, assert_as_good_as_plain, make, packed_options

from fat5.ops import RelativeBias, attention
from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.op import attention_forward, planned
from pairwise import pairwise

LAYOUTS = ["batched", "strided", "masked", "holes", "packed"]
LENGTHS = {
    f"L{length_q}-{length_k}": (length_q, length_k)
    for length_q, length_k in ((1, 1), (5, 5), (63, 63), (65, 130), (127, 127), (513, 513), (1100, 40))
}


@pairwise(2, lengths=LENGTHS, layout=LAYOUTS, bias=["none", "vector", "dense"], causal=[False, True])
def test_cpu_is_as_good_as_plain(lengths, layout, bias, causal):
    assert_as_good_as_plain(make(*lengths, bias=bias, layout=layout, causal=causal), "cpu")


@pytest.mark.parametrize("head_dim", [8, 32, 64, 128, 80])
def test_cpu_head_dims(head_dim):
    assert_as_good_as_plain(make(70, 70, head_dim=head_dim, layout="packed", scale=head_dim**-0.5), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bias", ["none", "vector", "dense"])
@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_cpu_in_half_precision(layout, bias, dtype):
    assert_as_good_as_plain(make(65, 65, bias=bias, layout=layout, scale=0.25), "cpu", dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("bias", ["none", "vector", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdpa_agrees(layout, bias, causal):
    assert_as_good_as_plain(make(33, 47, bias=bias, layout=layout, causal=causal), "sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["none", "vector"])
def test_flex_agrees_forward(bias):
    problem = make(33, 33, bias=bias, causal=True)
    given = None if problem.vector is None else RelativeBias(problem.vector)
    arguments = dict(bias=given, **problem.options)
    with torch.no_grad():
        flex = attention(problem.q, problem.k, problem.v, backend="flex", **arguments)
    torch.testing.assert_close(flex, attention(problem.q, problem.k, problem.v, backend="reference", **arguments))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bias", ["none", "vector", "dense"])
def test_packed_is_each_document_alone(bias, backend, dropout_p):
    problem = make(40, 40, bias=bias, layout="packed", causal=True, dropout_p=dropout_p)
    given = RelativeBias(problem.vector) if bias == "vector" else problem.dense
    torch.manual_seed(3)
    together = attention(problem.q, problem.k, problem.v, bias=given, backend=backend, **problem.options)
    starts_q, starts_k = (problem.options[f"cu_seqlens_{side}"].tolist() for side in "qk")
    for n in range(len(starts_q) - 1):
        alone_q, alone_k = starts_q[n + 1] - starts_q[n], starts_k[n + 1] - starts_k[n]
        if alone_q == 0:
            continue
        # The document keeps its number, on which its dropout depends: empty documents stand before it.
        options = {
            "cu_seqlens_q": torch.tensor([0] * (n + 1) + [alone_q], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0] * (n + 1) + [alone_k], dtype=torch.int32),
        }
        torch.manual_seed(3)
        alone = attention(
            problem.q[starts_q[n] : starts_q[n + 1]],
            problem.k[starts_k[n] : starts_k[n + 1]],
            problem.v[starts_k[n] : starts_k[n + 1]],
            bias=given,
            backend=backend,
            **(problem.options | options),
        )
        assert torch.equal(alone, together[starts_q[n] : starts_q[n + 1]])
    assert not together[starts_q[-1] :].any()


@pytest.mark.parametrize("bias", ["none", "vector", "dense"])
@pytest.mark.parametrize("layout", ["batched", "packed", "masked"])
def test_dropout_is_the_specification_s(layout, bias):
    """cpu and reference draw one mask, forward and backward."""
    problem = make(130, 70, bias=bias, layout=layout, causal=layout == "packed", dropout_p=0.25)

    def run(backend: str) -> list[torch.Tensor]:
        torch.manual_seed(11)
        return problem.run(backend, torch.float32)

    for want, got in zip(run("reference"), run("cpu")):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_dropout_drops_its_share_and_follows_the_seed():
    q = torch.zeros(1, 2, 64, 8)
    ones = torch.ones(1, 2, 512, 8)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return attention(q, torch.zeros_like(ones), ones, dropout_p=0.4)

    kept = run(0)[..., 0] * 0.6
    assert abs(kept.mean() - 0.6) < 0.01  # 65,536 draws: five standard deviations
    assert kept.std() < 0.05
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_gradients_are_the_same_to_the_bit(layout):
    problem = make(65, 65, layout=layout, causal=True, dropout_p=0.1)
    torch.manual_seed(4)
    first = problem.run("cpu", torch.float32)
    for _ in range(99):
        torch.manual_seed(4)
        assert all(map(torch.equal, problem.run("cpu", torch.float32), first))


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_table_gradient_through_the_vector_is_the_dense_one(backend, bidirectional):
    """A table read through its vector learns what it learns through the whole matrix."""
    problem = make(150, 150, bias="none", causal=not bidirectional)
    table = torch.randn(32, 3)

    def gradient(backend: str, dtype: torch.dtype, dense: bool) -> torch.Tensor:
        leaf = table.to(dtype).requires_grad_()
        bias = RelativeBias.from_table(leaf, bidirectional=bidirectional, max_distance=128)
        out = attention(
            *(x.to(dtype) for x in (problem.q, problem.k, problem.v)), backend=backend,
            bias=bias.dense(150, 150) if dense else bias, **problem.options,
        )  # fmt: skip
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    want = gradient("reference", torch.float64, dense=True)
    assert (want != 0).sum() > 60, "nearly every bucket of every head takes part"
    error = (gradient(backend, torch.float32, dense=False) - want).norm() / want.norm()
    assert error < 2e-6


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("length", [60, 300, 700])
def test_bias_gradient_sums_to_zero(backend, length):
    """Each row of dS sums to zero, so the bias's gradient does."""
    gradient = make(length, length).run(backend, torch.float32)[4]
    assert gradient.sum(dim=1).abs().max() < 1e-4 * gradient.abs().sum(dim=1).max()


@pytest.mark.parametrize("backend", ["reference", "cpu", "sdpa"])
def test_row_without_keys_is_zero(backend):
    problem = make(9, 9, bias="dense", key_padding_mask=torch.tensor([[False] * 9, [True] * 9]))
    out = attention(problem.q, problem.k, problem.v, bias=problem.dense, backend=backend, **problem.options)
    assert not out[0].any()
    assert out[1].abs().min() > 0


@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_sides(backend, lengths):
    out, *gradients = make(*lengths).run(backend, torch.float32)
    assert out.shape[2] == lengths[0]
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients)


def test_reference_gradcheck():
    problem = make(3, 4, layout="packed", head_dim=2, reach=2, heads=2, causal=True)
    leaves = [x.double().requires_grad_() for x in (problem.q, problem.k, problem.v, problem.vector)]

    def run(q, k, v, vector):
        return attention(q, k, v, bias=RelativeBias(vector), backend="reference", **problem.options)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("bias", ["none", "vector", "dense"])
@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_opcheck(layout, bias):
    problem = make(7, 7, bias=bias, layout=layout, causal=True)
    inputs = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    starts = [problem.options.get(f"cu_seqlens_{side}") for side in "qk"]
    call = AttentionCall(*inputs, problem.vector, problem.dense, None, None, *starts, True, 0.5, 0.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(attention_forward, ("cpu", *call, *planned(call, "cpu")), test_utils=checks)


def test_compiles_without_graph_breaks():
    problem = make(20, 20, layout="packed", causal=True)
    table = torch.randn(32, 3, requires_grad=True)

    def step(q, k, v, table):
        bias = RelativeBias.from_table(table, bidirectional=False, max_distance=128)
        return attention(q, k, v, bias=bias, **problem.options).square().sum()

    step(problem.q, problem.k, problem.v, table).backward()
    eager, table.grad = table.grad, None
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(problem.q, problem.k, problem.v, table).backward()
    torch.testing.assert_close(table.grad, eager)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    reach=st.integers(1, 50),
    causal=st.booleans(),
)
def test_any_documents(lengths, reach, causal):
    total_q, total_k = (sum(side) for side in zip(*lengths))
    starts = [torch.tensor([0, *side], dtype=torch.int32).cumsum(0).int() for side in zip(*lengths)]
    options = {
        "scale": 0.5, "causal": causal, "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1],
        "max_seqlen_q": 40, "max_seqlen_k": 40,
    }  # fmt: skip
    q, k, v = torch.randn(total_q + 2, 2, 8), torch.randn(total_k + 1, 2, 8), torch.randn(total_k + 1, 2, 8)
    assert_as_good_as_plain(Problem(q, k, v, torch.randn(2, 2 * reach + 1), None, options), "cpu")


Q, KV = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8)
PACKED = packed_options(4, 4)
BAD = {
    "k": (Q, KV[:, :2], KV[:, :2], {}),
    "v": (Q, KV, KV[:, :, :4], {}),
    "q": (Q[0], KV, KV, {}),
    "k: expected the dtype of q": (Q, KV.bfloat16(), KV, {}),
    "v: expected the device of q": (Q, KV, KV.to("meta"), {}),
    "dropout_p": (Q, KV, KV, {"dropout_p": 1.0}),
    "backend": (Q, KV, KV, {"backend": "cuda"}),
    "bias": (Q, KV, KV, {"bias": torch.randn(3, 4, 6)}),
    "bias: expected 3 heads": (Q, KV, KV, {"bias": RelativeBias(torch.randn(2, 7))}),
    "bias: expected the device of q": (Q, KV, KV, {"bias": torch.randn(5, 6, device="meta")}),
    "bias: expected a shape that broadcasts": (*(torch.randn(8, 2, 8),) * 3, PACKED | {"bias": torch.randn(5, 5)}),
    "key_padding_mask": (Q, KV, KV, {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}),
    "cu_seqlens_k": (*(torch.randn(8, 2, 8),) * 3, {"cu_seqlens_q": PACKED["cu_seqlens_q"], "max_seqlen_q": 4}),
    "cu_seqlens_q: expected non-decreasing": (
        *(torch.randn(8, 2, 8),) * 3,
        PACKED | {"cu_seqlens_q": torch.tensor([0, 5, 3, 8, 8, 8, 8], dtype=torch.int32)},
    ),
    "cu_seqlens_k: the last value 8 is beyond the 6 rows of k": (
        torch.randn(8, 2, 8), *(torch.randn(6, 2, 8),) * 2,
        PACKED | {"cu_seqlens_k": torch.tensor([0, 0, 2, 4, 8, 8, 8], dtype=torch.int32)},
    ),
    "max_seqlen_k: 2 is below": (*(torch.randn(8, 2, 8),) * 3, PACKED | {"max_seqlen_k": 2}),
    "max_seqlen_q": (*(torch.randn(8, 2, 8),) * 3, PACKED | {"max_seqlen_q": 2}),
    "max_seqlen_q: expected an int": (*(torch.randn(8, 2, 8),) * 3, PACKED | {"max_seqlen_q": 4.0}),
    "cu_seqlens_q: expected an int32": (
        *(torch.randn(8, 2, 8),) * 3, PACKED | {"cu_seqlens_q": PACKED["cu_seqlens_q"].float()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(what):
    q, k, v, options = BAD[what]
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(what)}"):
        attention(q, k, v, **options)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_longest_documents_are_found_where_they_are_not_given(backend):
    q, vector = torch.randn(8, 2, 8), torch.randn(2, 9)
    starts = {name: PACKED[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    want = attention(q, q, q, bias=RelativeBias(vector), backend=backend, **PACKED)
    assert torch.equal(attention(q, q, q, bias=RelativeBias(vector), backend=backend, **starts), want)
    longer = {name: value.long() for name, value in starts.items()}
    assert torch.equal(attention(q, q, q, bias=RelativeBias(vector), backend=backend, **longer), want)
    none = torch.zeros(1, dtype=torch.int32)
    assert not attention(q, q, q, cu_seqlens_q=none, cu_seqlens_k=none, backend=backend).any()


def test_unavailable_backend_says_why():
    with pytest.raises(RuntimeError, match="float64"):
        attention(Q.double(), KV.double(), KV.double(), backend="cpu")
    with pytest.raises(RuntimeError, match="no backward on the CPU"):
        attention(Q.requires_grad_(), KV, KV, backend="flex")
    with pytest.raises(RuntimeError, match="dropout"):
        attention(Q, KV, KV, backend="sdpa", dropout_p=0.1)


def test_auto_is_the_cpu_path_on_the_cpu():
    arguments = make(30, 30)
    bias = RelativeBias(arguments.vector)
    out = attention(arguments.q, arguments.k, arguments.v, bias=bias, **arguments.options)
    assert torch.equal(
        out, attention(arguments.q, arguments.k, arguments.v, bias=bias, backend="cpu", **arguments.options)
    )
