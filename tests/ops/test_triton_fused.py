"""The fused Triton kernels against float64, on a GPU where there is one and interpreted elsewhere."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.problems import FLOOR, GRADIENT_RATIO, OUTPUT_RATIO, largest
from torch import Tensor

pytest.importorskip("triton")

from fat5.errors import ConfigurationError
from fat5.ops import geglu, geglu_joined, linear_cross_entropy, rms_norm, rotary, use_kernels
from fat5.ops.choice import COMPILED_ON_CUDA, uses_triton
from fat5.ops.geglu import geglu_reference
from fat5.ops.linear_cross_entropy import linear_cross_entropy_reference
from fat5.ops.rms_norm import rms_norm_reference
from fat5.ops.rotary import rotary_reference
from pairwise import pairwise

BRAIN, HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [SINGLE, BRAIN, HALF]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXAMPLES = 10 if HERE.type == "cpu" else 50


@pytest.fixture(autouse=True)
def _kernels_on() -> Iterator[None]:
    before = use_kernels("triton")
    yield
    use_kernels(before)


def gradients(call: Callable, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs, then the gradient of every input for upstream gradients that are the same whatever the dtype."""
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in inputs]
    outs = call(*leaves)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]


def assert_as_good(fast: Callable, plain: Callable, inputs: list[Tensor], outputs: int = 1) -> None:
    """Every output within twice, every gradient within three times plain PyTorch's error in the same precision."""
    exact, mild, found = gradients(plain, inputs, DOUBLE), gradients(plain, inputs), gradients(fast, inputs)
    floor = FLOOR[min((x.dtype for x in inputs), key=lambda dtype: -FLOOR[dtype])]
    for n, (want, usual, got) in enumerate(zip(exact, mild, found, strict=True)):
        assert got.shape == want.shape
        assert got.dtype == usual.dtype
        ratio = OUTPUT_RATIO if n < outputs else GRADIENT_RATIO
        allowed = ratio * largest(usual.double() - want) + floor * (1.0 + largest(want))
        error = largest(got.double() - want)
        assert error <= allowed, f"result {n}: error {error:.3g}, allowed {allowed:.3g}"


def draw(*shape: int, dtype: torch.dtype = SINGLE, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(HERE, dtype)


SHAPES = [(1, 1), (5, 33), (3, 4, 64), (17, 128), (2, 300), (0, 16), (2, 0, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    inputs = [draw(*shape, dtype=dtype, scale=3.0), draw(shape[-1], dtype=dtype)]
    assert_as_good(partial(rms_norm, eps=1e-6), partial(rms_norm_reference, eps=1e-6), inputs)


def test_rms_norm_of_wide_and_narrow_weights():
    assert_as_good(
        partial(rms_norm, eps=1e-6), partial(rms_norm_reference, eps=1e-6), [draw(9, 40, dtype=BRAIN), draw(40)]
    )
    too_wide = draw(1, (1 << 13) + 1)
    assert torch.equal(rms_norm(too_wide, torch.ones_like(too_wide[0])), plainly(rms_norm, too_wide))


def plainly(norm: Callable, x: Tensor) -> Tensor:
    use_kernels("plain")
    return norm(x, torch.ones_like(x[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1030)])
def test_geglu(shape, dtype):
    assert_as_good(geglu, geglu_reference, [draw(*shape, dtype=dtype, scale=4.0), draw(*shape, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 66), (3, 4, 128), (2, 0, 8)])
def test_geglu_joined(shape, dtype):
    assert_as_good(
        geglu_joined, lambda joined: geglu_reference(*joined.chunk(2, dim=-1)), [draw(*shape, dtype=dtype, scale=4.0)]
    )


def test_geglu_far_out():
    x = torch.tensor([-3e38, -1e4, -30.0, 0.0, 30.0, 1e4, 3e38], device=HERE)
    out, grad_gate, grad_up = gradients(geglu, [x, torch.ones_like(x)])
    assert torch.equal(out, x.clamp_min(0.0))
    assert torch.equal(grad_up.abs() > 0, x > 0)
    assert grad_gate.isfinite().all()


@pytest.mark.parametrize("operation", ["rms_norm", "geglu", "geglu_joined"])
@pytest.mark.parametrize("layout", ["every other column", "columns first", "part of a row", "expanded"])
def test_strided_inputs(operation, layout):
    def view(columns: int = 24) -> Tensor:
        if layout == "every other column":
            return draw(6, 2 * columns)[:, ::2]
        if layout == "columns first":
            return draw(columns, 6).t()
        if layout == "part of a row":
            return draw(6, 3 * columns)[:, columns : 2 * columns]
        return draw(1, columns).expand(6, columns)

    if operation == "geglu":
        fast, plain, inputs = geglu, geglu_reference, [view(), view()]
    elif operation == "geglu_joined":
        fast, plain, inputs = geglu_joined, lambda x: geglu_reference(*x.chunk(2, dim=-1)), [view()]
    else:
        fast, plain = partial(rms_norm, eps=1e-6), partial(rms_norm_reference, eps=1e-6)
        inputs = [view(), draw(24)]

    def strided(call: Callable) -> Callable:
        # Leaves are made contiguous by `gradients`; the op is to see the view's strides.
        wide = [torch.empty_strided(x.shape, x.stride(), device=HERE, dtype=x.dtype) for x in inputs]
        if layout == "expanded":
            return lambda *xs: call(*(x[:1].expand(6, -1) if x.dim() == 2 else x for x in xs))
        return lambda *xs: call(*(x if x.dim() == 1 else torch.as_strided(_laid_out(x, w), w.shape, w.stride())
                                  for x, w in zip(xs, wide)))  # fmt: skip

    assert_as_good(strided(fast), strided(plain), inputs)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x's numbers where `like`'s strides would have them, differentiably."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride()))
    index = sum(
        torch.arange(size, device=HERE).view([-1 if k == dim else 1 for k in range(like.dim())]) * stride
        for dim, (size, stride) in enumerate(zip(like.shape, like.stride()))
    )
    return torch.zeros(extent, device=HERE, dtype=x.dtype).index_put((index.expand(like.shape),), x)


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    turned = draw(*shape, scale=3.0)
    return turned.cos(), turned.sin()


# Leading dimensions, heads, head dimension, half of what rotates.
ROTATIONS = [
    ((5,), 3, 16, 8),
    ((2, 7), 2, 20, 5),
    ((1,), 1, 2, 1),
    ((3,), 2, 9, 3),
    ((0,), 2, 8, 4),
    ((3,), 0, 8, 4),
    ((4,), 2, 8, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("leading", "heads", "width", "half"), ROTATIONS)
def test_rotary(leading, heads, width, half, dtype):
    cos, sin = angles(*leading, half)
    x = draw(*leading, heads, width, dtype=dtype)
    assert_as_good(lambda x: rotary(x, cos, sin), lambda x: rotary_reference(x, cos, sin), [x])


def test_rotary_of_a_view_and_of_shared_angles():
    cos, sin = angles(6, 4)
    both = draw(2, 6, 24)
    for view in (
        lambda x: x[..., 12:].unflatten(-1, (1, 12)),
        lambda x: x.unflatten(-1, (3, 8)).transpose(-1, -2).transpose(-1, -2),
        lambda x: x.unflatten(-1, (8, 3)).transpose(-1, -2),
    ):
        assert_as_good(
            lambda x, v=view: rotary(v(x), cos, sin), lambda x, v=view: rotary_reference(v(x), cos, sin), [both]
        )


def test_rotary_turns_back_and_says_what_does_not_fit():
    from fat5.ops.triton.rotary import rotary_forward

    (cos, sin), x = angles(5, 4), draw(5, 2, 10)
    assert largest(rotary_forward(rotary(x, cos, sin), cos, sin, True) - x) < 4 * FLOOR[SINGLE]
    cos.requires_grad_()
    assert torch.autograd.grad(rotary(x, cos, sin).sum(), cos)[0].any(), "learned angles get their gradient"
    with pytest.raises(ValueError, match=r"^cos, sin"):
        rotary(x, *angles(5, 6))


LOSSES = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)]


def loss_problem(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::3] = -100
    weight = draw(vocabulary, width, dtype=dtype, scale=2.0 * width**-0.5)
    return [draw(rows, width, dtype=dtype), weight], labels.to(HERE)


@pairwise(3, loss=LOSSES, reduction=["mean", "sum", "none"], dtype=DTYPES)
def test_linear_cross_entropy(loss, reduction, dtype):
    inputs, labels = loss_problem(11, 8, 37, dtype)
    how = dict(zip(("z_loss", "label_smoothing"), loss), reduction=reduction)
    assert_as_good(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk_size=4, **how),
        lambda h, w: linear_cross_entropy_reference(h, w, labels, **how),
        inputs,
    )


@pytest.mark.parametrize("vocabulary", [1, 16, 4096, 4097, 9000])
def test_linear_cross_entropy_of_any_vocabulary(vocabulary):
    inputs, labels = loss_problem(4, 8, vocabulary, SINGLE)
    how = dict(z_loss=0.1, label_smoothing=0.1)
    assert_as_good(
        lambda h, w: linear_cross_entropy(h, w, labels, **how),
        lambda h, w: linear_cross_entropy_reference(h, w, labels, **how),
        inputs,
    )


def test_linear_cross_entropy_at_the_edges():
    (hidden, weight), labels = loss_problem(5, 8, 19, SINGLE)
    weight.requires_grad_()
    assert linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="none").shape == (0,)
    nothing = torch.full_like(labels, -100)
    linear_cross_entropy(hidden * 1e30, weight, nothing, reduction="sum", z_loss=1.0).backward()
    assert not weight.grad.any()
    labels[1] = 19
    assert linear_cross_entropy(hidden, weight, labels, reduction="none").isnan().tolist() == [
        False, True, False, False, False,
    ]  # fmt: skip
    hot = linear_cross_entropy(1e4 * hidden, weight, labels[2:3].expand(5), reduction="none")
    assert hot.isfinite().all()


def test_linear_cross_entropy_under_autocast():
    (hidden, weight), labels = loss_problem(9, 16, 30, SINGLE)
    with torch.autocast(HERE.type, BRAIN):
        found = gradients(lambda h, w: linear_cross_entropy(h, w, labels, z_loss=0.1), [hidden, weight])
    # The same products in bfloat16, cast by hand.
    cast = gradients(lambda h, w: linear_cross_entropy(h.to(BRAIN), w.to(BRAIN), labels, z_loss=0.1), [hidden, weight])
    for got, want in zip(found, cast, strict=True):
        assert got.dtype == SINGLE
        assert largest(got - want) <= FLOOR[BRAIN] * (1.0 + largest(want))


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=st.integers(0, 40), width=st.integers(1, 70), dtype=st.sampled_from(DTYPES))
def test_any_shape(rows, width, dtype):
    x, weight = draw(rows, width, dtype=dtype), draw(width, dtype=dtype)
    assert_as_good(partial(rms_norm, eps=1e-6), partial(rms_norm_reference, eps=1e-6), [x, weight])
    assert_as_good(geglu, geglu_reference, [x, draw(rows, width, dtype=dtype)])
    inputs, labels = loss_problem(rows, width, 3 * width, dtype)
    how = dict(z_loss=0.01, label_smoothing=0.1, reduction="sum")
    assert_as_good(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk_size=16, **how),
        lambda h, w: linear_cross_entropy_reference(h, w, labels, **how),
        inputs,
    )


def test_registered_as_torch_expects():
    from fat5.ops.triton.geglu import geglu_forward, geglu_joined_forward
    from fat5.ops.triton.rms_norm import rms_norm_forward
    from fat5.ops.triton.rotary import rotary_forward

    x, weight = (draw(*shape).requires_grad_() for shape in ((5, 8), (8,)))
    torch.library.opcheck(rms_norm_forward, (x, weight, 1e-6))
    torch.library.opcheck(geglu_forward, (x, x.detach().requires_grad_()))
    torch.library.opcheck(geglu_joined_forward, (x,))
    torch.library.opcheck(rotary_forward, (draw(5, 2, 9).requires_grad_(), *angles(5, 4), False))


@pytest.mark.parametrize("operation", ["rms_norm", "geglu", "rotary", "linear_cross_entropy"])
def test_compiles_without_a_graph_break(operation):
    labels, turned = torch.tensor([3, -100, 1, 0], device=HERE), angles(4, 2)
    calls = {
        "rms_norm": lambda x, w: rms_norm(2 * x, w[0]) + 1,
        "geglu": lambda x, w: geglu(2 * x, x * w[0]) + 1,
        "rotary": lambda x, w: rotary((2 * x).view(4, 2, 4), *turned) * w[0].view(2, 4),
        "linear_cross_entropy": lambda x, w: linear_cross_entropy(2 * x, w, labels),
    }
    call = calls[operation]
    inputs = [draw(4, 8), draw(6, 8)]
    # Not inductor without a GPU: it would need a C++ compiler, and what is asked is the graph.
    compiled = torch.compile(call, fullgraph=True, backend="inductor" if HERE.type == "cuda" else "aot_eager")
    for got, want in zip(gradients(compiled, inputs), gradients(call, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_switch():
    x = draw(2, 8)
    assert all(uses_triton(operation, x) for operation in COMPILED_ON_CUDA)
    use_kernels("geglu=plain, rms_norm=triton")
    assert uses_triton("rms_norm", x)
    assert not uses_triton("geglu", x)
    assert uses_triton("linear_cross_entropy", x) == x.is_cuda
    assert not uses_triton("rms_norm", x) or use_kernels("plain") == "geglu=plain, rms_norm=triton"
    assert not any(uses_triton(operation, x) for operation in COMPILED_ON_CUDA)
    use_kernels("auto")
    assert not uses_triton("linear_cross_entropy", x.double())
    use_kernels("triton")
    with pytest.raises(ConfigurationError, match="float64"):
        geglu(x.double(), x.double())
    for wrong in ("fast", "geglu=fast", "gelu=triton", ""):
        with pytest.raises(ConfigurationError, match="FAT5_KERNELS"):
            use_kernels(wrong)
