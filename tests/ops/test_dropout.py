"""Dropout on the CPU: how much it drops, what it keeps, its gradient, and where it leaves the work to PyTorch."""

import math

import pytest
import torch
from torch import nn

from fat5.ops import Dropout

LEVELS = 65536


def kept(p: float, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(5)
    return Dropout(p)(torch.ones(*shape, dtype=dtype))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("shape", [(4099, 131), (1 << 19,)])
def test_the_share_of_zeros_in_each_part_of_a_draw(p, shape):
    out = kept(p, *shape).flatten()
    for lane in range(4):
        part = out[lane::4]
        spread = math.sqrt(p * (1 - p) / len(part))
        assert float((part == 0).double().mean()) == pytest.approx(p, abs=5 * spread)
    # Neighbours of one draw are independent.
    zero = (out == 0).double() - p
    assert abs(float((zero[1:] * zero[:-1]).mean())) < 5 * p * (1 - p) / math.sqrt(len(out))


def test_what_is_kept_is_scaled_by_the_share_that_is_dropped():
    assert kept(0.1, 1000).unique().tolist() == [0.0, LEVELS / (LEVELS - 6554)]
    assert kept(0.25, 1000).unique().tolist() == [0.0, 4 / 3]


def test_the_gradient_is_that_of_the_same_zeros():
    torch.manual_seed(0)
    x = torch.randn(7, 13, dtype=torch.float64, requires_grad=True)
    out = Dropout(0.3)(x)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    torch.testing.assert_close(x.grad, torch.where(out == 0, 0.0, weight * (LEVELS / (LEVELS - 19661))))


def test_a_seed_gives_the_same_zeros_and_two_calls_do_not():
    assert torch.equal(kept(0.4, 999), kept(0.4, 999))
    torch.manual_seed(5)
    layer, x = Dropout(0.4), torch.ones(999)
    assert not torch.equal(layer(x), layer(x))


def test_the_scale_is_not_rounded_to_bfloat16():
    """1/0.9 is 1.109375 in bfloat16, 0.2% less: forward and backward round once, behind the product."""
    x = torch.randn(1000, dtype=torch.bfloat16, requires_grad=True)
    out = Dropout(0.1)(x)
    grad = torch.randn_like(x)
    out.backward(grad)
    scale = LEVELS / (LEVELS - 6554)
    for got, given in ((out, x), (x.grad, grad)):
        assert torch.equal(got, torch.where(out == 0, 0.0, (given.float() * scale).bfloat16()))


def test_second_derivatives():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)

    def drop(x):
        torch.manual_seed(0)
        return Dropout(0.3)(x).square()

    assert torch.autograd.gradgradcheck(drop, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_stay(dtype):
    out = kept(0.5, 3, 0, 5, dtype=dtype)
    assert out.shape == (3, 0, 5)
    assert out.dtype == dtype
    assert kept(0.5, 3, 5, dtype=dtype).dtype == dtype


def test_without_training_or_probability_nothing_happens():
    x = torch.randn(50)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(50))


def test_in_torch_compile_it_is_pytorch_s():
    layer, x = Dropout(0.5), torch.ones(64)
    torch.manual_seed(1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.manual_seed(1)
    assert torch.equal(compiled, nn.functional.dropout(x, 0.5))
