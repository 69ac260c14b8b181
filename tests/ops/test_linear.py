"""Linear layers by oneDNN: as close to float64 as PyTorch's own product, differentiable twice, and out of the way."""

import sys

import pytest
import torch
from torch import nn

from fat5.ops import linear
from fat5.ops.linear import product, serves

# Sums of 300 terms in float32, in whatever order: both products err by a few roundings of the sum of magnitudes.
ROUNDING = 1e-5

MODULE = sys.modules["fat5.ops.linear"]

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    monkeypatch.setattr(MODULE, "ONEDNN", torch.backends.mkldnn.is_available())


def test_mkl_multiplies_on_a_processor_without_onednn(monkeypatch):
    a, b = torch.randn(300, 70, requires_grad=True), torch.randn(70, 90)
    assert type(product(a, b).grad_fn).__name__ != "MmBackward0"
    monkeypatch.setattr(MODULE, "ONEDNN", False)
    assert type(product(a, b).grad_fn).__name__ == "MmBackward0"
    assert torch.equal(product(a, b), a @ b)


@needs_onednn
@pytest.mark.parametrize("transposed_a", [False, True])
@pytest.mark.parametrize("transposed_b", [False, True])
@pytest.mark.parametrize("shape", [(64, 1, 1), (65, 33, 300), (300, 7, 129), (64, 500, 3)])
def test_product_is_the_product(shape, transposed_a, transposed_b):
    m, n, k = shape
    a = torch.randn(k, m).t() if transposed_a else torch.randn(m, k)
    b = torch.randn(n, k).t() if transposed_b else torch.randn(k, n)
    assert serves(a, b)
    got, want = product(a, b), a.double() @ b.double()
    assert got.is_contiguous()
    assert ((got - want).abs() <= ROUNDING * (a.double().abs() @ b.double().abs())).all()


@needs_onednn
def test_gradients_of_a_layer():
    layer = nn.Linear(24, 40, bias=False)
    x = torch.randn(3, 50, 24, requires_grad=True)
    upstream = torch.randn(3, 50, 40)
    ours = torch.autograd.grad(linear(layer, x), [x, layer.weight], upstream)
    plain = torch.autograd.grad(layer(x), [x, layer.weight], upstream)
    for got, want in zip(ours, plain):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_opcheck():
    a, b = torch.randn(70, 5, requires_grad=True), torch.randn(9, 5).t().requires_grad_()
    torch.library.opcheck(torch.ops.fat5.product.default, (a, b))


def test_compiles_without_graph_breaks():
    layer, x = nn.Linear(8, 16, bias=False), torch.randn(70, 8)
    compiled = torch.compile(lambda x: linear(layer, x).square().sum(), fullgraph=True, backend="aot_eager")
    loss = compiled(x)
    loss.backward()
    torch.testing.assert_close(loss, layer(x).square().sum())
    assert layer.weight.grad.abs().sum() > 0


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_layers_are_called_as_they_are():
    x = torch.randn(64, 8)
    subclass, biased, hooked = Doubled(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    replaced = nn.Linear(8, 8, bias=False)
    replaced.forward = lambda x: torch.full_like(x, 7.0)  # as accelerate's hooks do
    for layer in (subclass, biased, hooked, replaced):
        assert torch.equal(linear(layer, x), layer(x))
    plain = nn.Linear(8, 8, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(plain, x).dtype == torch.bfloat16
    assert linear(plain.double(), x.double()).dtype == torch.float64


def test_nothing_at_all_is_nothing():
    assert linear(nn.Linear(8, 4, bias=False), torch.zeros(2, 0, 8)).shape == (2, 0, 4)
