"""The Hopper backend: what it serves, how its sums make a gradient, and where the packages are, its kernels."""

import logging
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from tests.ops.attention_cases import (
    Case,
    alone,
    by_both,
    by_hopper,
    call_of,
    distance,
    draw,
    exact,
    gradients,
    plain,
)

pytest.importorskip("triton")

from fat5.bench.static_report.compile import cuobjdump
from fat5.ops import RelativeBias, attention
from fat5.ops.attention.hopper import backend, mixed, reduction
from fat5.ops.attention.hopper.launch_table import KEYS, PADDING, STRIP, query_block
from fat5.ops.attention.op import SELECTIVE, attention_forward, planned
from fat5.ops.triton.launch import recording

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or backend.MISSING is not None,
    reason="waits for a Hopper card and fat5[hopper]",
)
COMPILES = pytest.mark.skipif(
    backend.MISSING is not None or not sys.platform.startswith("linux"), reason="waits for fat5[hopper]"
)

# The rule of test_triton_attention.py.
OUTPUT_RATIO, GRADIENT_RATIO, FLOOR = 2.0, 3.0, 2e-6
HALF, BRAIN = torch.float16, torch.bfloat16
DOCUMENTS = ((37, 20), (0, 9), (1, 1), (33, 0), (70, 165), (300, 129))
SAME_DOCUMENTS = ((0, 0), (20, 20), (1, 1), (0, 0), (355, 355), (128, 128), (513, 513), (0, 0))
LONG_DOCUMENTS = ((200, 200), (128, 128), (500, 500), (0, 0), (1, 1))


def call_with(**changes):  # type: ignore[no-untyped-def]
    x = torch.zeros(1, 1, 4, 64, dtype=BRAIN, device=DEVICE)
    options = dict(
        key_padding_mask=None, seed=None, cu_seqlens_q=None, cu_seqlens_k=None, causal=False, scale=1.0, dropout_p=0.0
    )
    return call_of(x, x, x, None, **options)._replace(**changes)


def test_says_what_it_needs() -> None:
    x = torch.zeros(1, 1, 4, 64, dtype=BRAIN)
    with pytest.raises(RuntimeError, match=r"backend='hopper' cannot serve this call: it needs CUDA tensors"):
        attention(x, x, x, backend="hopper")


def test_another_version_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", lambda name: backend.PINNED[name])
    assert backend._missing() is None
    monkeypatch.setattr(backend, "version", lambda name: "4.8.1" if name == "nvidia-cutlass-dsl" else "9.9")
    assert backend._missing() == ("it needs flash-attn-4 4.0.0b36, 9.9 is installed: pip install 'fat5[hopper]'")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", missing)
    assert "flash-attn-4 4.0.0b36, which is not installed" in str(backend._missing())


class OnHopper:
    """A tensor's stand-in that says it lies on a GPU."""

    is_cuda, device, shape, dtype = True, torch.device("cuda"), (1, 1, 4, 64), BRAIN


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"dense": torch.zeros(1)}, "no dense bias"),
        ({"key_padding_mask": torch.zeros(1)}, "no key padding mask"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"causal": True}, None),
        ({"causal": True, "k": torch.zeros(1, 1, 5, 64)}, "queries and keys of one length"),
        ({"vector": torch.zeros(1, 2 * 256 + 1)}, None),
        ({"vector": torch.zeros(1, 2 * 256 + 1, requires_grad=True)}, "a reach up to 255, this one has 256"),
    ],
)
def test_what_it_serves(changes: dict, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "MISSING", None)
    monkeypatch.setattr(backend, "architecture", lambda device: 90)
    reason = backend.unsupported(call_with(q=OnHopper, **changes))
    assert reason is None if said is None else said in str(reason)
    monkeypatch.setattr(backend, "architecture", lambda device: 100)
    assert "Hopper card" in str(backend.unsupported(call_with(q=OnHopper)))


def stand_in(*shape: int) -> type[OnHopper]:
    return type("Long", (OnHopper,), {"shape": shape, "requires_grad": False})


STARTS = torch.tensor([0, 8192])
PACKED = {"q": stand_in(8192, 1, 64), "k": stand_in(8192, 1, 64), "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
PADDED = {"q": stand_in(8, 1, 1024, 64), "k": stand_in(8, 1, 1024, 64)}
VECTOR = torch.zeros(1, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        (PADDED | {"vector": VECTOR}, "hopper"),
        (PADDED | {"vector": VECTOR, "causal": True}, "hopper"),
        (PADDED | {"vector": VECTOR, "q": stand_in(9, 1, 1000, 64)}, None),
        (PADDED | {"q": stand_in(7, 1, 1024, 64)}, None),
        (PADDED | {"vector": VECTOR.detach()}, "hopper"),
        (PADDED | {"vector": VECTOR.detach(), "v": torch.zeros(1, requires_grad=True)}, None),
        (PADDED, "hopper"),
        (PADDED | {"vector": VECTOR, "dropout_p": 0.1}, None),
        (PADDED | {"causal": True}, None),  # Triton's forward is faster there, and no backward comes
        (PADDED | {"causal": True, "v": VECTOR}, "mixed"),
        (PACKED | {"vector": VECTOR}, "mixed"),
        (PACKED | {"vector": VECTOR, "v": VECTOR, "causal": True}, "mixed"),
        (PACKED | {"vector": VECTOR.detach(), "causal": True}, None),  # no backward comes
        (PACKED | {"v": VECTOR, "cu_seqlens_k": STARTS.clone()}, "mixed"),
        (PACKED | {"vector": VECTOR, "cu_seqlens_q": torch.zeros(83), "cu_seqlens_k": torch.zeros(83)}, None),
    ],
)
def test_auto_takes_it_where_the_table_says_so(
    changes: dict, taken: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "architecture", lambda device: 90)
    monkeypatch.setattr(backend, "MISSING", None)
    call = call_with(**changes)
    assert [name for name, asked in SELECTIVE.items() if asked(call)] == ([taken] if taken else [])
    monkeypatch.setattr(backend, "MISSING", "it needs something")
    monkeypatch.setattr(backend, "_told", set())
    with caplog.at_level(logging.WARNING):
        assert not any(asked(call) for asked in SELECTIVE.values() for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs in Triton's kernels, Hopper's would be faster: it needs something"
    ] * bool(taken)
    monkeypatch.setattr(backend, "architecture", lambda device: 80)
    assert not any(asked(call) for asked in SELECTIVE.values())


def test_what_auto_asks_is_traced_without_a_graph_break() -> None:
    def asked(x: torch.Tensor) -> torch.Tensor:
        call = call_with(q=x, k=x, v=x)
        said = (*(asks(call) for asks in SELECTIVE.values()), backend._is_hopper(x.device), backend._tell("nothing"))
        return x + sum(said)

    x = torch.zeros(8, 1, 1024, 64, dtype=BRAIN, device="cpu")
    assert torch.equal(torch.compile(asked, fullgraph=True, backend="eager")(x), x)


def left_by_the_hooks(case: Case, grad_scores: list[torch.Tensor], call, near, far, reach: int) -> None:  # type: ignore[no-untyped-def]
    """Near and Far as the kernels leave them, from dS (heads, queries, keys) of each document."""
    queries = query_block(case.head_dim)
    starts = [0] * len(grad_scores) if call.cu_seqlens_k is None else call.cu_seqlens_k.tolist()
    for n, whole in enumerate(grad_scores):
        heads, query_length, key_length = whole.shape
        first = (starts[n] // KEYS + n if call.packed else n * -(-key_length // KEYS)) * (KEYS // STRIP)
        for strip in range(-(-key_length // KEYS) * (KEYS // STRIP)):
            sums = torch.zeros(heads, 2)
            begin = strip * STRIP // KEYS * KEYS // queries if case.causal else 0
            for tile in range(begin, -(-query_length // queries)):
                rows, keys = slice(tile * queries, (tile + 1) * queries), slice(strip * STRIP, (strip + 1) * STRIP)
                part = torch.zeros(heads, queries, STRIP)
                given = whole[:, rows, keys]
                part[:, : given.shape[1], : given.shape[2]] = given
                lags = strip * STRIP + torch.arange(STRIP) - (tile * queries + torch.arange(queries))[:, None]
                for lag in range(int(lags.min()), int(lags.max()) + 1):
                    value = part[:, lags == lag].sum(1)
                    if -reach < lag < reach:
                        near[:, first + strip, tile % 2, lag + reach] = value
                    else:
                        sums[:, int(lag > 0)] += value
            far[:, first + strip] = sums


@pytest.mark.parametrize("reach", [1, 91])
@pytest.mark.parametrize(
    "case",
    [
        Case(300, 300, head_dim=64, batch=2, causal=True),
        Case(70, 290, head_dim=128, batch=1),
        Case(documents=((130, 40), (0, 200), (50, 0), (200, 300)), tail=9, head_dim=128),
        Case(documents=((130, 130), (0, 0), (1, 1), (257, 257)), tail=140, head_dim=64, causal=True),
    ],
    ids=str,
)
def test_sums_make_the_gradient(case: Case, reach: int) -> None:
    """Of dS drawn at random; buffers start as NaN, so that nothing is read which no kernel wrote."""
    inputs = draw(case, DEVICE)
    vector = torch.zeros(case.heads, 2 * reach + 1, requires_grad=True, device=DEVICE)
    call = call_of(inputs.q, inputs.k, inputs.v, RelativeBias(vector), **inputs.options)
    near, far = reduction.buffers(call)
    sides = case.documents or ((case.query_length, case.key_length),) * case.batch
    grad_scores = [torch.randn(case.heads, *side) for side in sides]
    if case.causal:
        grad_scores = [x.tril() for x in grad_scores]
    near, far = near.cpu(), far.cpu()
    left_by_the_hooks(case, grad_scores, call, near, far, reach)
    found = reduction.vector_gradient(call, reduction.plan(call)[1], near.to(DEVICE), far.to(DEVICE)).cpu()
    expected = torch.zeros(case.heads, 2 * reach + 1, dtype=torch.float64)
    for x in grad_scores:
        lags = torch.arange(x.shape[2]) - torch.arange(x.shape[1])[:, None]
        bins = (lags.clamp(-reach, reach) + reach).flatten().expand(case.heads, -1)
        expected.scatter_add_(1, bins, x.double().flatten(1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


def test_rows_of_no_document_are_cleared() -> None:
    starts = torch.tensor([0, 5, 7], dtype=torch.int32, device=DEVICE)
    x, y = torch.empty(300, 2, 64, device=DEVICE), torch.ones(7, 2, 64, device=DEVICE)
    reduction.clear_rows_of_no_document(starts, x, y)
    assert x[:7].isnan().all()
    assert not x[7:].any()
    assert y.all()


COMPILE = "from tests.ops.test_hopper import compiled; compiled({head_dim}, {causal}, {packed}, {learned}, {forward})"


def compiled(head_dim: int, causal: bool, packed: bool, learned: bool, forward: bool) -> None:
    """Sends a call through the package's compiler; tensors are fake, nothing runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fat5.ops.attention.hopper import host

    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: 0  # DLPack asks, of a PyTorch without CUDA too
    with FakeTensorMode(), torch.device("cuda"), recording():
        shape = (1000, 4, head_dim) if packed else (2, 4, 500, head_dim)
        q, k, v, grad_out = (torch.empty(shape, dtype=BRAIN) for _ in range(4))
        starts = torch.empty(4, dtype=torch.int32) if packed else None
        vector = torch.empty(4, 183, requires_grad=learned)
        call = call_of(
            q, k, v, RelativeBias(vector), key_padding_mask=None, seed=None, cu_seqlens_q=starts, cu_seqlens_k=starts,
            causal=causal, scale=1.0, dropout_p=0.0,
        )  # fmt: skip
        plan = (torch.empty(4, 183 + 2 * PADDING), None)
        out, lse = call.empty_like(q), call.empty_lse()
        if forward:
            host.forward(call, plan)
        host.backward(call, plan, grad_out, out, lse, learned)


def compile_for(arch: int, folder: Path, *choices: object) -> dict[str, str]:
    """The machine code of what was compiled, by the kernel's name."""
    folder.mkdir(exist_ok=True)
    target = {"FLASH_ATTENTION_ARCH": f"sm_{arch}", "CUTE_DSL_ARCH": f"sm_{arch}a", "FLASH_ATTENTION_NUM_SMS": "132"}
    environment = os.environ | target | {"CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": str(folder)}
    program = COMPILE.format(**dict(zip(("head_dim", "causal", "packed", "learned", "forward"), choices)))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.name: cuobjdump("-sass", str(path)) for path in folder.glob("*.cubin")}


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_for_sm_90_without_a_gpu(head_dim: int, causal: bool, packed: bool, tmp_path: Path) -> None:
    """Without a spill, and without the waits that ptxas puts around every product where it runs out of registers."""
    for learned in (True, False):
        found = compile_for(90, tmp_path / str(learned), head_dim, causal, packed, learned, learned)
        for name in ("BiasedForward", "LearningBackward") if learned else ("BiasedBackward",):
            (code,) = (code for kernel, code in found.items() if name in kernel)
            assert "HGMMA" in code
            assert not re.search(r"\b(STL|LDL)\b", code), name
            assert code.count("WARPGROUP.DEPBAR") <= 12, name


@COMPILES
@pytest.mark.slow
def test_a_fixed_bias_compiles_for_sm_100_without_a_gpu(tmp_path: Path) -> None:
    """The backward; before its forward the package asks the driver, which no machine without a GPU has."""
    assert any("Sm100" in name for name in compile_for(100, tmp_path, 64, False, False, False, False))


CASES = [
    Case(1, 1, bias="relative", head_dim=64, dtype=BRAIN),
    Case(5, 63, bias="relative", head_dim=64, dtype=BRAIN, reach=91),
    Case(63, 63, bias="relative", head_dim=128, dtype=HALF, causal=True),
    Case(300, 700, bias="relative", head_dim=64, dtype=BRAIN, reach=1),
    Case(700, 300, bias="relative", head_dim=128, dtype=BRAIN, reach=200),
    Case(513, 513, bias="relative", head_dim=64, dtype=HALF, reach=91),
    Case(513, 513, bias="relative", head_dim=64, dtype=BRAIN, reach=113, causal=True),
    Case(513, 513, bias="relative", head_dim=128, dtype=BRAIN, reach=91, causal=True),
    Case(513, 513, bias="relative", head_dim=128, dtype=HALF, reach=91),
    Case(300, 300, bias="relative", head_dim=64, dtype=BRAIN, scale=0.25, strided=True),
    Case(300, 300, bias="relative", head_dim=128, dtype=BRAIN, scale=-0.5),
    Case(30, 30, bias="relative", head_dim=64, dtype=BRAIN, scale=0.0),
    Case(65, 33, head_dim=64, dtype=HALF),
    Case(333, 333, head_dim=128, dtype=BRAIN, causal=True),
    Case(40, 100, bias="relative", head_dim=64, dtype=BRAIN, reach=0),
    Case(documents=LONG_DOCUMENTS, bias="relative", head_dim=64, dtype=BRAIN, tail=9, reach=91),
    Case(documents=LONG_DOCUMENTS, bias="relative", head_dim=128, dtype=BRAIN, causal=True, reach=91),
    Case(documents=LONG_DOCUMENTS, bias="relative", head_dim=64, dtype=HALF, causal=True, strided=True),
    Case(documents=SAME_DOCUMENTS, bias="relative", head_dim=128, dtype=HALF, tail=70),
    Case(documents=DOCUMENTS, head_dim=64, dtype=HALF, tail=3),
    Case(documents=DOCUMENTS, bias="relative", head_dim=64, dtype=BRAIN, tail=3),
    Case(documents=DOCUMENTS, bias="relative", head_dim=128, dtype=BRAIN, reach=91),
    Case(documents=((0, 0), (0, 0)), bias="relative", head_dim=64, dtype=BRAIN, tail=5),
]


@pytest.mark.parametrize(("width", "is_read"), [(1, False), (3, True)])
def test_a_constant_bias_is_in_neither_pass(width: int, is_read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's backward leaves it out, and with it in the log-sum-exp of the forward the weights would be wrong."""
    monkeypatch.setattr(mixed.triton, "plan", lambda call: (call.vector, None))
    monkeypatch.setattr(mixed.triton, "forward", lambda call, plan: (call.vector, plan[0]))
    monkeypatch.setattr(mixed.hopper, "plan", lambda call: (None, None))
    call = call_with(vector=torch.zeros(1, width))
    want = call.vector if is_read else None
    assert mixed.forward(call, mixed.plan(call)) == (want, want)


@ON_HOPPER
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kernels", [by_hopper, by_both])
def test_close_to_float64(kernels, case: Case) -> None:  # type: ignore[no-untyped-def]
    inputs = draw(case, DEVICE)
    found = gradients(kernels, inputs)
    expected = gradients(exact, inputs, torch.float64)
    usual = gradients(plain, inputs)
    for name, value in found.items():
        assert value.shape == expected[name].shape
        ratio = OUTPUT_RATIO if name == "out" else GRADIENT_RATIO
        floor = FLOOR * (expected[name].norm() + value.numel() ** 0.5)
        assert distance(value, expected[name]) <= ratio * distance(usual[name], expected[name]) + floor, name


@ON_HOPPER
@pytest.mark.parametrize("head_dim", [64, 128])
def test_log_sum_exp_is_triton_s(head_dim: int) -> None:
    """So that a forward of one backend has a backward of the other."""
    from fat5.ops.attention.triton import backend as triton

    for case in (Case(300, 300, bias="relative"), Case(documents=LONG_DOCUMENTS, bias="relative", causal=True)):
        inputs = draw(Case(**(vars(case) | {"head_dim": head_dim, "dtype": BRAIN})), DEVICE)
        call = call_of(inputs.q, inputs.k, inputs.v, RelativeBias(inputs.bias), **inputs.options)
        lse, want = (one.forward(call, one.plan(call))[1] for one in (backend, triton))
        torch.testing.assert_close(lse, want, rtol=1e-5, atol=1e-5)


@ON_HOPPER
@pytest.mark.parametrize(
    "case",
    [
        Case(documents=LONG_DOCUMENTS, bias="relative", head_dim=64, dtype=BRAIN, reach=91),
        Case(documents=LONG_DOCUMENTS, bias="relative", head_dim=128, dtype=BRAIN, causal=True),
        Case(documents=DOCUMENTS, head_dim=64, dtype=HALF),
    ],
    ids=str,
)
def test_packed_equals_one_by_one(case: Case) -> None:
    inputs = draw(case, DEVICE)
    packed = gradients(by_hopper, inputs)
    bias_gradient = 0.0
    assert case.documents is not None
    for n, (query_length, key_length) in enumerate(case.documents):
        own = gradients(by_hopper, alone(inputs, case, n)[0])
        start_q, start_k = (inputs.options[f"cu_seqlens_{side}"][n] for side in "qk")
        for name, start, length in (
            ("out", start_q, query_length), ("dq", start_q, query_length),
            ("dk", start_k, key_length), ("dv", start_k, key_length),
        ):  # fmt: skip
            assert torch.equal(packed[name][start : start + length].transpose(0, 1)[None], own[name]), (name, n)
        bias_gradient = bias_gradient + own.get("dbias", 0.0)
    if case.bias == "relative":
        torch.testing.assert_close(packed["dbias"], bias_gradient, rtol=1e-4, atol=1e-4)


@ON_HOPPER
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_the_same_to_the_bit(causal: bool, head_dim: int) -> None:
    for documents in (None, LONG_DOCUMENTS):
        case = Case(700, 700, documents, bias="relative", head_dim=head_dim, dtype=BRAIN, reach=91, causal=causal)
        inputs = draw(case, DEVICE)
        first = gradients(by_hopper, inputs)
        for _ in range(99):
            for name, value in gradients(by_hopper, inputs).items():
                assert torch.equal(value, first[name]), name


@ON_HOPPER
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_bias_that_learns_nothing_changes_no_other_gradient(head_dim: int, causal: bool) -> None:
    inputs = draw(Case(300, 300, bias="relative", head_dim=head_dim, dtype=BRAIN, causal=causal), DEVICE)
    learned = gradients(by_hopper, inputs)
    fixed = gradients(
        lambda q, k, v, bias, **how: by_hopper(q, k, v, RelativeBias(bias.vector.detach()), **how), inputs
    )
    assert fixed.pop("dbias") is None
    for name, value in fixed.items():
        assert torch.equal(value, learned[name]), name


@ON_HOPPER
def test_far_bins_are_summed_directly() -> None:
    """As exact as the bins between them: no bin is what the others leave."""
    inputs = draw(Case(900, 900, bias="relative", head_dim=64, dtype=BRAIN, reach=91, heads=4), DEVICE)
    found, want = gradients(by_hopper, inputs)["dbias"], gradients(exact, inputs, torch.float64)["dbias"]
    usual = gradients(plain, inputs)["dbias"]
    for bins in (slice(0, 1), slice(-1, None)):
        assert distance(found[:, bins], want[:, bins]) <= GRADIENT_RATIO * distance(usual[:, bins], want[:, bins])


@ON_HOPPER
def test_rows_of_no_document_are_zero() -> None:
    inputs = draw(Case(documents=LONG_DOCUMENTS, bias="relative", head_dim=64, dtype=BRAIN, tail=140), DEVICE)
    for name, value in gradients(by_hopper, inputs).items():
        if name != "dbias":
            assert (value[-140:] == 0).all(), name


@ON_HOPPER
@pytest.mark.parametrize("backend_name", ["hopper", "mixed"])
@pytest.mark.parametrize("packed", [False, True])
def test_registered_as_torch_expects(packed: bool, backend_name: str) -> None:
    case = Case(200, 200, LONG_DOCUMENTS if packed else None, bias="relative", head_dim=64, dtype=BRAIN)
    inputs = draw(case, DEVICE)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.bias)]
    call = call_of(*leaves[:3], RelativeBias(leaves[3]), **inputs.options)
    torch.library.opcheck(attention_forward, (backend_name, *call, *planned(call, backend_name)))
    if packed:
        torch.library.opcheck(reduction.strips_of, (call.cu_seqlens_q, call.cu_seqlens_k, len(call.k), 128))


@ON_HOPPER
@pytest.mark.parametrize("backend_name", ["hopper", "mixed"])
def test_compiles_without_a_graph_break_and_replays_as_a_cuda_graph(backend_name: str) -> None:
    inputs = draw(Case(documents=LONG_DOCUMENTS, bias="relative", head_dim=64, dtype=BRAIN, causal=True), DEVICE)
    starts = inputs.options["cu_seqlens_q"]
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.bias)]

    def step(q, k, v, vector):  # type: ignore[no-untyped-def]
        return attention(
            q, k, v, bias=RelativeBias(vector), causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts,
            max_seqlen_q=500, max_seqlen_k=500, backend=backend_name,
        )  # fmt: skip

    def run(call) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out)]

    want = run(step)
    assert all(map(torch.equal, run(torch.compile(step, fullgraph=True)), want))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(step)
    for x in recorded:
        x.zero_()
    graph.replay()
    assert all(map(torch.equal, recorded, want))


@ON_HOPPER
def test_another_user_of_the_package_is_untouched() -> None:
    from flash_attn.cute import flash_attn_func, interface
    from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
    from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90

    q, k, v = (torch.randn(2, 300, 4, 64, device=DEVICE, dtype=BRAIN, requires_grad=True) for _ in range(3))

    def theirs() -> list[torch.Tensor]:
        out = flash_attn_func(q, k, v, deterministic=True)
        out = out[0] if isinstance(out, tuple) else out
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    names = {name: id(value) for name, value in vars(interface).items()}
    before = theirs()
    gradients(by_hopper, draw(Case(300, 300, bias="relative", head_dim=64, dtype=BRAIN), DEVICE))
    assert {name: id(value) for name, value in vars(interface).items()} == names
    assert interface.FlashAttentionForwardSm90 is FlashAttentionForwardSm90
    assert interface.FlashAttentionBackwardSm90 is FlashAttentionBackwardSm90
    assert all(map(torch.equal, theirs(), before))
