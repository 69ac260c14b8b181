"""RelativeBias: T5's buckets to the bit, ALiBi's slopes, the dense form."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from fat5.ops import RelativeBias


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 256), (64, 1000), (8, 16), (32, 20)])
def test_buckets_are_t5_s(num_buckets, max_distance, bidirectional):
    table = torch.arange(float(num_buckets))[:, None]
    length = max_distance + 40
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    want = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    bias = RelativeBias.from_table(table, bidirectional=bidirectional, max_distance=max_distance)
    assert torch.equal(bias.dense(length, length)[0, 0].long(), want)


@pytest.mark.parametrize(("bidirectional", "reach"), [(True, 91), (False, 113)])
def test_reach_of_published_t5(bidirectional, reach):
    bias = RelativeBias.from_table(torch.randn(32, 4), bidirectional=bidirectional, max_distance=128)
    assert bias.max_distance == reach
    assert bias.num_heads == 4


def test_table_gradient_counts_its_entries():
    table = torch.zeros(32, 2, dtype=torch.float64, requires_grad=True)
    RelativeBias.from_table(table, bidirectional=True, max_distance=128).dense(200, 200).sum().backward()
    assert table.grad.sum() == 2 * 200 * 200
    assert (table.grad[0] == 200).all()


def test_dense_starts_at_the_offset():
    bias = RelativeBias(torch.randn(2, 21))
    assert torch.equal(bias.dense(1, 30, 29), bias.dense(30, 30)[:, :, 29:])


@pytest.mark.parametrize("heads", [8, 12])
def test_alibi(heads):
    bias = RelativeBias.alibi(heads, 50).dense(51, 51)[0]
    assert torch.equal(bias, bias.transpose(1, 2))
    slopes = -bias[:, 0, 1]
    torch.testing.assert_close(bias[:, 0], -slopes[:, None] * torch.arange(51.0))
    assert slopes[0] == 2.0 ** -(8 / (1 << heads.bit_length() - 1))
    assert len(set(slopes.tolist())) == heads


def test_asymmetric_alibi_tells_left_from_right():
    bias = RelativeBias.alibi(4, 10, asymmetric=True).dense(11, 11)[0]
    assert (bias[:, 5, 4] != bias[:, 5, 6]).all()
    torch.testing.assert_close(bias[:, 5, 0], 5 * bias[:, 5, 4])


@pytest.mark.parametrize("vector", [torch.randn(3, 4), torch.randn(5), torch.arange(5)[None]])
def test_bad_vector_is_named(vector):
    with pytest.raises((TypeError, ValueError), match=r"^vector"):
        RelativeBias(vector)
