"""The Triton attention kernels against the float64 specification, on a GPU where there is one and interpreted
elsewhere."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ops.attention_cases import (
    SMALL_TILES,
    Case,
    Inputs,
    alone,
    by_triton,
    call_of,
    distance,
    draw,
    error,
    exact,
    gradients,
    plain,
)

pytest.importorskip("triton")

from torch._dynamo.testing import CompileCounterWithBackend

from fat5.ops import RelativeBias, attention
from fat5.ops.attention.dropout import keep_mask
from fat5.ops.attention.op import attention_forward, planned
from fat5.ops.attention.triton import backend, host
from fat5.ops.attention.triton.configuration import overridden
from fat5.ops.triton.launch import Launch

INTERPRETED = not torch.cuda.is_available()
SLOW_WHEN_INTERPRETED = [pytest.mark.slow] if INTERPRETED else []

# How much worse than plain PyTorch in the same precision the kernels may be, against float64 (the rule of
# FlashAttention's own tests), and a floor for problems on which plain PyTorch happens to be exact: relative, and
# absolute an element, since inputs are of unit size and a gradient that is zero in theory is rounding in practice.
OUTPUT_RATIO, GRADIENT_RATIO, FLOOR = 2.0, 3.0, 2e-6

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DOCUMENTS = ((37, 20), (0, 9), (1, 1), (33, 0), (40, 50))
SAME_DOCUMENTS = ((0, 0), (20, 20), (1, 1), (0, 0), (55, 55), (16, 16), (0, 0))

CASES = [
    Case(1, 1, bias="relative"),
    Case(5, 63, bias="relative", dtype=BRAIN),
    Case(63, 63, bias="relative", causal=True, dtype=BRAIN, head_dim=64, batch=1),
    Case(40, 100, bias="relative", causal=True, reach=1),
    Case(33, 65, head_dim=128, dtype=BRAIN, batch=1, heads=1),
    Case(65, 33, head_dim=24, dtype=HALF, causal=True),
    Case(40, 40, bias="relative", scale=0.25, head_dim=80, heads=1),
    Case(30, 30, bias="relative", scale=-0.5),
    Case(30, 30, bias="relative", scale=0.0),
    Case(30, 40, bias="relative", key_mask=True, dtype=BRAIN),
    Case(45, 45, bias="relative", dropout_p=0.1, causal=True, dtype=BRAIN),
    Case(50, 70, bias="dense:1xnxnxn", causal=True),
    Case(documents=SAME_DOCUMENTS, bias="relative", causal=True, dtype=BRAIN, strided=True),
    Case(documents=DOCUMENTS, tail=3, dtype=HALF),
    Case(documents=DOCUMENTS, bias="relative", dropout_p=0.2, heads=1),
    Case(documents=DOCUMENTS, bias="dense:1xnxnxn", dtype=BRAIN, heads=1),
    Case(documents=((0, 0), (0, 0)), bias="relative", tail=5),
]
# Seconds in the interpreter, milliseconds on a GPU.
MORE_CASES = [
    Case(documents=SAME_DOCUMENTS, bias="relative", tail=9),
    Case(documents=SAME_DOCUMENTS, bias="relative", causal=True, dropout_p=0.2),
    Case(documents=DOCUMENTS, bias="dense:nxnxnxn"),
    Case(50, 70, bias="dense:1xnx1xn", key_mask=True),
    Case(50, 70, bias="relative", key_mask=True),
    Case(65, 127, bias="relative", head_dim=32, dtype=HALF, batch=1),
    Case(127, 65, bias="relative", reach=20),
    Case(127, 65, bias="relative", causal=True),
    Case(64, 96, bias="relative", reach=95),
    Case(45, 70, bias="relative", dropout_p=0.3),
    Case(63, 65, bias="relative", strided=True),
    Case(50, 70, bias="dense:nxnxnxn", dtype=BRAIN),
    Case(50, 70, bias="dense:nx1x1xn"),
    Case(50, 70, bias="dense:1x1xnx1"),
    Case(60, 60, bias="relative", causal=True, key_mask=True, batch=3, heads=1),
]
SLOW_CASES = [
    Case(513, 513, bias="relative", reach=91, head_dim=64, dtype=dtype, batch=1, causal=causal)
    for dtype in (HALF, BRAIN, SINGLE)
    for causal in (False, True)
]


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    with overridden(**SMALL_TILES) if INTERPRETED else contextlib.nullcontext():
        yield


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=SLOW_WHEN_INTERPRETED) for case in MORE_CASES)], ids=str
)
def test_close_to_float64(case: Case, device: torch.device) -> None:
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_close_to_float64_at_length(case: Case, device: torch.device) -> None:
    with (
        overridden(**{name: Launch(64, 64, 4, 1) for name in SMALL_TILES}) if INTERPRETED else contextlib.nullcontext()
    ):
        check(case, device)


def check(case: Case, device: torch.device) -> None:
    inputs = draw(case, device)
    found = gradients(by_triton, inputs)
    expected = gradients(exact, inputs, torch.float64)
    usual = gradients(plain, inputs, bias_dtype=case.dtype if case.bias != "relative" else None)
    for name, value in found.items():
        assert value.shape == expected[name].shape
        ratio = OUTPUT_RATIO if name == "out" else GRADIENT_RATIO
        floor = FLOOR * (expected[name].norm() + value.numel() ** 0.5)
        assert distance(value, expected[name]) <= ratio * distance(usual[name], expected[name]) + floor, name


def test_log_sum_exp(device: torch.device) -> None:
    inputs = draw(Case(40, 70, bias="relative", key_mask=True), device)
    mask = inputs.options["key_padding_mask"]
    call = call_of(inputs.q, inputs.k, inputs.v, RelativeBias(inputs.bias), **inputs.options)
    _, lse = backend.forward(call, backend.plan(call))
    scores = inputs.q.double() @ inputs.k.double().transpose(-1, -2) + RelativeBias(inputs.bias.double()).dense(40, 70)
    expected = scores.masked_fill(~mask[:, None, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=2e-6, atol=2e-6)
    assert (lse[-1] == float("-inf")).all(), "the last batch row sees no key"


@pytest.mark.parametrize(
    "case",
    [
        Case(documents=((1, 1), (37, 37), (0, 0)), bias="relative", heads=1),
        pytest.param(Case(documents=SAME_DOCUMENTS, bias="relative"), marks=SLOW_WHEN_INTERPRETED),
        pytest.param(Case(documents=DOCUMENTS, causal=True), marks=SLOW_WHEN_INTERPRETED),
    ],
    ids=str,
)
def test_packed_equals_one_by_one(case: Case, device: torch.device) -> None:
    inputs = draw(case, device)
    packed = gradients(by_triton, inputs)
    bias_gradient = 0.0
    assert case.documents is not None
    for n, (query_length, key_length) in enumerate(case.documents):
        own_inputs, _ = alone(inputs, case, n)
        own = gradients(by_triton, own_inputs)
        start_q, start_k = (inputs.options[f"cu_seqlens_{side}"][n] for side in "qk")
        for name, start, length in (
            ("out", start_q, query_length),
            ("dq", start_q, query_length),
            ("dk", start_k, key_length),
            ("dv", start_k, key_length),
        ):
            # Tiles start at each document, so the arithmetic is the same to the bit.
            assert torch.equal(packed[name][start : start + length].transpose(0, 1)[None], own[name]), (name, n)
        bias_gradient = bias_gradient + own.get("dbias", 0.0)
    if case.bias == "relative":
        torch.testing.assert_close(packed["dbias"], bias_gradient)


@pytest.mark.parametrize("causal", [pytest.param(False, marks=SLOW_WHEN_INTERPRETED), True])
def test_bias_gradient_sums_to_zero(causal: bool, device: torch.device) -> None:
    inputs = draw(Case(documents=SAME_DOCUMENTS, bias="relative", causal=causal, dropout_p=0.2, heads=1), device)
    gradient = gradients(by_triton, inputs)["dbias"].double()
    # Each row of dS sums to zero, dropout or not.
    assert gradient.sum(1).abs().max() < 1e-5 * gradient.abs().sum(1).max()


def test_unused_distances_get_exactly_no_gradient(device: torch.device) -> None:
    inputs = draw(Case(20, 20, bias="relative", reach=40), device)
    gradient = gradients(by_triton, inputs)["dbias"]
    assert (gradient[:, :21] == 0).all()
    assert (gradient[:, 60:] == 0).all()
    assert (gradient[:, 21:60] != 0).all()


def test_table_gradient_through_the_vector(device: torch.device) -> None:
    inputs = draw(Case(90, 90, batch=1), device)
    table = torch.randn(8, 2, device=device, dtype=torch.float64)

    def table_gradient(attend, dtype: torch.dtype) -> torch.Tensor:
        leaf = table.to(dtype).requires_grad_()
        bias = RelativeBias.from_table(leaf, bidirectional=True, max_distance=20)
        out = attend(*(x.to(dtype) for x in (inputs.q, inputs.k, inputs.v)), bias, **inputs.options)
        out.backward(inputs.grad_out.to(dtype))
        return leaf.grad

    assert error(table_gradient(by_triton, SINGLE), table_gradient(exact, torch.float64)) < 5e-6


def test_padded_keys_may_hold_nan(device: torch.device) -> None:
    inputs = draw(Case(40, 50, bias="relative", key_mask=True, heads=1), device)
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None].expand_as(inputs.k)
    clean = gradients(by_triton, inputs)
    inputs.k, inputs.v = (x.masked_fill(hidden, float("nan")) for x in (inputs.k, inputs.v))
    for name, value in gradients(by_triton, inputs).items():
        assert torch.equal(value, clean[name]), name


def test_rows_of_no_document_are_zero(device: torch.device) -> None:
    inputs = draw(Case(documents=SAME_DOCUMENTS, bias="relative", tail=40, heads=1), device)
    for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out):
        x[-40:] = float("nan")
    found = gradients(by_triton, inputs)
    for name in ("out", "dq", "dk", "dv"):
        assert (found[name][-40:] == 0).all(), name
    assert found["dbias"].isfinite().all()


def test_dense_minus_infinity_hides(device: torch.device) -> None:
    inputs = draw(Case(40, 50, bias="dense:1x1xnxn"), device)
    hidden = torch.rand(40, 50, device=device) > 0.5
    hidden[3] = True
    inputs.bias = inputs.bias.masked_fill(hidden, float("-inf"))
    found = gradients(by_triton, inputs)
    assert (found["out"][:, :, 3] == 0).all()
    assert all(value.isfinite().all() for value in found.values())
    assert (found["dbias"][0, 0][hidden] == 0).all()


@pytest.mark.parametrize("runs", [2 if INTERPRETED else 100])
def test_gradients_are_the_same_to_the_bit(runs: int, device: torch.device) -> None:
    inputs = draw(Case(documents=SAME_DOCUMENTS, bias="relative", dtype=BRAIN, heads=1), device)
    first = gradients(by_triton, inputs)
    for _ in range(runs - 1):
        for name, value in gradients(by_triton, inputs).items():
            assert torch.equal(value, first[name]), name


OTHER_TILES = {
    "forward": Launch(16, 32, 4, 1),
    "query_gradient": Launch(16, 16, 4, 1),
    "key_gradient": Launch(32, 16, 4, 1),
    "band": Launch(64, 32, 4, 1),
}


@pytest.mark.parametrize("tiles", [SMALL_TILES, OTHER_TILES], ids=["small", "other"])
def test_dropout_mask_is_the_specified_one_whatever_the_tiles(tiles: dict, device: torch.device) -> None:
    length, heads, head_dim = 40, 2, 64
    q, k = (torch.randn(1, heads, length, head_dim, device=device) * 0.3 for _ in range(2))
    # With v = 1 the output is the dropped weights, and with dO = 1 the gradient of v is their transpose.
    one = torch.eye(length, head_dim, device=device).expand(1, heads, -1, -1).contiguous()
    options = draw(Case(length, length, dropout_p=0.4), device).options
    with overridden(**tiles):
        found = gradients(by_triton, Inputs(q, k, one, None, one, options))
    kept = keep_mask(options["seed"], 0.4, 0, heads, range(length), range(length))
    assert torch.equal(found["out"][0, :, :, :length] != 0, kept)
    assert torch.equal(found["dv"][0, :, :, :length] != 0, kept.transpose(1, 2))


def test_gradients_under_dropout_with_other_tiles(device: torch.device) -> None:
    # The band tile is larger than that of the dQ pass, and must be cut to it.
    with overridden(**OTHER_TILES):
        check(Case(30, 34, bias="relative", dropout_p=0.4), device)


lengths = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=3)


@settings(max_examples=3 if INTERPRETED else 16, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    documents=lengths,
    tail=st.integers(0, 20),
    head_dim=st.sampled_from([16, 17]),
    bias=st.sampled_from(["none", "relative", "dense:nxnxnxn"]),
    reach=st.integers(0, 60),
    causal=st.booleans(),
)
def test_any_documents(documents: list, tail: int, head_dim: int, bias: str, reach: int, causal: bool) -> None:
    case = Case(documents=tuple(documents), tail=tail, head_dim=head_dim, bias=bias, reach=reach, causal=causal)
    check(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(17, 20, bias="relative"), marks=SLOW_WHEN_INTERPRETED),
        Case(documents=((17, 20),), bias="dense:nxnxnxn", dropout_p=0.1),
    ],
    ids=str,
)
def test_registered_as_torch_expects(case: Case, device: torch.device) -> None:
    inputs = draw(case, device)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.bias)]
    bias = RelativeBias(leaves[3]) if case.bias == "relative" else leaves[3]
    call = call_of(*leaves[:3], bias, **inputs.options)
    torch.library.opcheck(attention_forward, ("triton", *call, *planned(call, "triton")))
    if call.packed:
        starts, (rows, _, width) = call.cu_seqlens_q, call.q.shape
        torch.library.opcheck(
            host.work_lists, (starts, starts, rows, rows, width, call.q.dtype, call.causal, True, True, True)
        )


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    """And once: steps of one budget hold other documents, other numbers of rows in use, and other biases."""
    if INTERPRETED:
        compiler = CompileCounterWithBackend("aot_eager")  # Inductor would need a C++ compiler here.
    else:
        compiler = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attention, fullgraph=True, backend=compiler)
    for documents in (((20, 20), (9, 9)), ((0, 0), (17, 17))):
        tail = 32 - sum(length for length, _ in documents)
        inputs = draw(Case(documents=documents, bias="relative", tail=tail), device)
        options = {name: value for name, value in inputs.options.items() if name != "seed"}
        options |= {"max_seqlen_q": 32, "max_seqlen_k": 32}
        found = []
        for call in (compiled, attention):
            vector = inputs.bias.detach().requires_grad_()
            out = call(inputs.q, inputs.k, inputs.v, bias=RelativeBias(vector), backend="triton", **options)
            found += [out.detach(), *torch.autograd.grad(out, vector, inputs.grad_out)]
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])
    assert compiler.frame_count == 1, "later steps must not compile again"


def test_says_what_it_cannot_serve(device: torch.device) -> None:
    x = torch.zeros(1, 1, 4, 256, device=device)
    with pytest.raises(RuntimeError, match="float64"):
        attention(*(x[..., :16].double() for _ in range(3)), backend="triton")
    with pytest.raises(RuntimeError, match="head dimensions 1 to 128, q has 256"):
        attention(x, x, x, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU with 40 GB")
def test_more_than_two_billion_elements() -> None:
    device = torch.device("cuda")
    rows, heads, head_dim = 2**22 + 200, 8, 64
    q = torch.randn(rows, heads, head_dim, device=device, dtype=BRAIN)
    starts = torch.tensor([0, rows - 150, rows], dtype=torch.int32, device=device)
    ends = torch.tensor([0, 1, 151], dtype=torch.int32, device=device)
    vector = torch.randn(heads, 15, device=device)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": ends, "max_seqlen_q": rows, "max_seqlen_k": 150}
    out = attention(q, q[-151:], q[-151:], bias=RelativeBias(vector), backend="triton", **packed)
    last = q[-150:].transpose(0, 1)[None]
    expected = attention(last, last, last, bias=RelativeBias(vector), backend="reference")
    assert error(out[-150:], expected[0].transpose(0, 1)) < 1e-2
