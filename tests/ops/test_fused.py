"""RMSNorm, gated GELU and the chunked cross-entropy against their references."""

import sys

import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.t5.modeling_t5 import T5LayerNorm

import fat5.ops
from fat5.ops import geglu, linear_cross_entropy, rms_norm, token_statistics
from fat5.ops.geglu import _GEGLU, geglu_reference
from fat5.ops.linear_cross_entropy import linear_cross_entropy_reference
from fat5.ops.rms_norm import rms_norm_reference
from pairwise import pairwise

LOSSES = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)]


def gradients(function, *inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_as_good(fast, plain, *inputs):
    """Twice plain PyTorch's error against float64 forward, three times backward."""
    exact = gradients(plain, *(x.double() for x in inputs))
    for n, (want, mild, got) in enumerate(zip(exact, gradients(plain, *inputs), gradients(fast, *inputs))):
        allowed = (2 if n == 0 else 3) * (mild.double() - want).abs().max() + 1e-7 * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (3, 4, 64), (0, 16)])
def test_rms_norm(shape):
    x, weight = 3 * torch.randn(shape), torch.randn(shape[-1])
    layer = T5LayerNorm(shape[-1], eps=1e-6)
    layer.weight.data = weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), layer(x))
    if x.numel():
        assert_as_good(lambda a, w: rms_norm(a, w, 1e-6), lambda a, w: rms_norm_reference(a, w, 1e-6), x, weight)


def test_rms_norm_gradcheck_and_dtype():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 6), (6,)))
    assert gradcheck(lambda a, w: rms_norm(a, w, 1e-3), (x, weight))
    assert rms_norm(torch.randn(3, 8, dtype=torch.bfloat16), torch.ones(8)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"^weight"):
        rms_norm(torch.randn(3, 8), torch.ones(7))


@pytest.mark.parametrize("shape", [(1,), (7, 33), (3, 50, 1000)])
def test_geglu(shape):
    assert_as_good(geglu, geglu_reference, 4 * torch.randn(shape), torch.randn(shape))


def test_geglu_far_out_and_gradcheck():
    x = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], requires_grad=True)
    ours, theirs = (gradients(f, x, torch.ones(5)) for f in (geglu, _GEGLU.apply))
    for got, want in zip(ours, theirs):
        torch.testing.assert_close(got, want)
    assert gradcheck(geglu, [torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(2)])


@pairwise(3, chunk_size=[None, 3, 1], loss=LOSSES, reduction=["mean", "sum", "none"])
def test_linear_cross_entropy(chunk_size, loss, reduction):
    hidden, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 5), (11, 5)))
    labels = torch.randint(0, 11, (7,))
    labels[2] = -100
    how = dict(zip(("z_loss", "label_smoothing"), loss), reduction=reduction)

    def run(h, w):
        return linear_cross_entropy(h, w, labels, chunk_size=chunk_size, **how)

    torch.testing.assert_close(run(hidden, weight), linear_cross_entropy_reference(hidden, weight, labels, **how))
    assert gradcheck(run, (hidden, weight))


def test_linear_cross_entropy_errs_no_more_than_plain():
    labels = torch.randint(0, 500, (300,))
    assert_as_good(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk_size=64),
        lambda h, w: linear_cross_entropy_reference(h, w, labels),
        torch.randn(300, 32),
        torch.randn(500, 32),
    )


def test_linear_cross_entropy_never_holds_the_logits(monkeypatch):
    """No matrix product gives more rows of logits than a chunk."""
    module = sys.modules["fat5.ops.linear_cross_entropy"]
    rows = []
    made = module._logits
    monkeypatch.setattr(module, "_logits", lambda h, w, d: rows.append(len(h)) or made(h, w, d))
    hidden = torch.randn(1000, 8, requires_grad=True)
    linear_cross_entropy(hidden, torch.randn(50, 8), torch.zeros(1000, dtype=torch.long), chunk_size=128).backward()
    assert max(rows) <= 128
    assert sum(rows) == 1000


def test_linear_cross_entropy_under_autocast():
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    labels = torch.randint(0, 30, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    want = linear_cross_entropy_reference(hidden, weight, labels)
    torch.testing.assert_close(loss, want, rtol=2e-2, atol=2e-2)


def test_empty_and_all_ignored():
    weight = torch.randn(9, 4, requires_grad=True)
    nothing = torch.full((3,), -100)
    assert linear_cross_entropy(torch.randn(3, 4), weight, nothing, reduction="sum") == 0
    linear_cross_entropy(torch.randn(3, 4), weight, nothing, reduction="sum", z_loss=1.0).backward()
    assert not weight.grad.any()
    assert linear_cross_entropy(torch.randn(0, 4), weight, nothing[:0], reduction="none").shape == (0,)
    losses, correct = token_statistics(torch.randn(0, 4), weight, nothing[:0])
    assert losses.shape == correct.shape == (0,)


def test_no_label_that_counts_gives_nan_without_nan_gradients():
    """A rank or a micro-batch without labels must not spoil the others' gradients."""
    hidden, weight, nothing = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4), torch.full((3,), -100)
    for loss in (linear_cross_entropy, linear_cross_entropy_reference):
        value = loss(hidden, weight, nothing, z_loss=0.1)
        assert value.isnan()
        assert not torch.autograd.grad(value, hidden)[0].any()


def test_float16_weight_gradient_of_many_tokens_is_finite():
    """Its sum leaves float16, its mean does not."""
    hidden, weight = torch.full((4096, 4), 30.0).half(), torch.zeros(5, 4).half().requires_grad_()
    labels = torch.zeros(4096, dtype=torch.long)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), weight)
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient[0], torch.full((4,), -24.0).half())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_of_rows(reduction):
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(9, 4), torch.randint(0, 9, (2, 3))
    got = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    want = linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), reduction=reduction)
    assert torch.equal(got, want.view(got.shape))
    assert got.shape == (labels.shape if reduction == "none" else ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [rms_norm, geglu])
def test_second_derivatives_are_right(function, dtype):
    shapes = ((3, 4), (4,)) if function is rms_norm else ((3, 4), (3, 4))
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    if dtype == torch.float64:
        assert torch.autograd.gradgradcheck(function, inputs)
        return

    def second(f, inputs):
        first = torch.autograd.grad(f(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    double = [x.detach().double().requires_grad_() for x in inputs]
    for got, want in zip(second(function, inputs), second(function, double)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("reduction", "why"), [("mean", "no second derivative"), ("none", "no autograd formula")])
def test_the_loss_has_no_second_derivative_and_says_so(reduction, why):
    hidden, labels = torch.randn(3, 4, requires_grad=True), torch.zeros(3, dtype=torch.long)
    loss = linear_cross_entropy(hidden, torch.randn(5, 4), labels, reduction=reduction).square().sum()
    with pytest.raises(RuntimeError, match=why):
        torch.autograd.grad(torch.autograd.grad(loss, hidden, create_graph=True)[0].sum(), hidden)


def test_token_statistics():
    hidden, weight, labels = torch.randn(20, 8), torch.randn(15, 8), torch.randint(0, 15, (20,))
    labels[4] = -100
    losses, correct = token_statistics(hidden, weight, labels, chunk_size=6)
    torch.testing.assert_close(losses, linear_cross_entropy_reference(hidden, weight, labels, reduction="none"))
    assert torch.equal(correct, (hidden @ weight.t()).argmax(dim=1) == labels)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_of_a_batch(reduction):
    hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(15, 8), torch.randint(0, 15, (2, 5))
    labels[1, 3:] = -100
    options = {"z_loss": 0.1, "label_smoothing": 0.1, "reduction": reduction}
    flat = linear_cross_entropy(hidden.view(10, 8), weight, labels.view(10), **options)
    loss = linear_cross_entropy(hidden, weight, labels, **options)
    assert loss.shape == (labels.shape if reduction == "none" else ())
    assert torch.equal(loss.flatten(), flat.flatten())


@pytest.mark.parametrize("operator", ["linear_cross_entropy_summed", "linear_cross_entropy_per_token"])
def test_opcheck(operator):
    inputs = (torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True), torch.randint(0, 7, (5,)))
    flags = (True,) if operator.endswith("summed") else ()
    torch.library.opcheck(
        getattr(torch.ops.fat5, operator).default, (*inputs, 0.1, 0.1, -100, 2, torch.float32, *flags)
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("weight", (torch.randn(3, 4), torch.randn(5, 3), torch.zeros(3, dtype=torch.long), {})),
        ("labels", (torch.randn(3, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.long), {})),
        ("reduction", (torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long), {"reduction": "max"})),
        (
            "label_smoothing",
            (torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long), {"label_smoothing": 1.5}),
        ),
        ("z_loss", (torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long), {"z_loss": -1.0})),
        ("chunk_size", (torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long), {"chunk_size": 0})),
        ("labels: expected an int64", (torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3), {})),
        ("labels: expected an int64", (torch.randn(3, 4), torch.randn(5, 4), [0, 1, 2], {})),
        (
            "weight: expected the device",
            (torch.randn(3, 4), torch.randn(5, 4, device="meta"), torch.zeros(3, dtype=torch.long), {}),
        ),
        (
            "labels: expected the device",
            (torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long, device="meta"), {}),
        ),
    ],
)
def test_bad_arguments_are_named(name, arguments):
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        linear_cross_entropy(*arguments[:3], **arguments[3])


def test_names_are_exported():
    assert {"attention", "RelativeBias", "rms_norm", "geglu", "linear_cross_entropy"} <= set(fat5.ops.__all__)
