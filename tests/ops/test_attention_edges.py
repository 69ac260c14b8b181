"""Where every backend must say the same: rows that see nothing, padding that holds NaN, autocast, no documents."""

import re

import pytest
import torch
import torch.utils.checkpoint

pytest.importorskip("triton")

from fat5.ops import RelativeBias, attention, attention_weights
from fat5.ops.attention.cpu.kernels import forward_scratch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["reference", "triton", "sdpa", *(["cpu"] if DEVICE.type == "cpu" else [])]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
HEADS = 2  # the interpreter's time goes by heads


def rows(query_length: int, key_length: int) -> list[torch.Tensor]:
    return [torch.randn(2, HEADS, n, 16, device=DEVICE) for n in (query_length, key_length, key_length)]


def out_and_gradients(leaves: list[torch.Tensor], backend: str, **options) -> list[torch.Tensor]:
    """The last leaf is the bias: a vector (H, 2R+1) or dense."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    bias = RelativeBias(leaves[3]) if leaves[3].dim() == 2 else leaves[3]
    out = attention(*leaves[:3], bias=bias, backend=backend, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@EVERY_BACKEND
def test_dense_bias_that_hides_a_whole_row(backend):
    bias = torch.randn(1, HEADS, 6, 7, device=DEVICE)
    bias[:, :, 2] = bias[:, 1, :, 3:] = float("-inf")
    found = out_and_gradients([*rows(6, 7), bias], backend)
    want = out_and_gradients([x.double() for x in (*rows(6, 7), bias)], "reference")
    assert all(x.isfinite().all() for x in (*found, *want))
    assert not found[0][:, :, 2].any()
    assert not found[1][:, :, 2].any()
    assert not found[4][:, :, 2].any()


@EVERY_BACKEND
def test_dense_and_mask_together_hide_a_row(backend):
    bias = torch.zeros(1, 1, 4, 5, device=DEVICE)
    bias[:, :, 1, :3] = float("-inf")
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5], device=DEVICE)
    inputs = [*rows(4, 5), bias]
    found = out_and_gradients(inputs, backend, key_padding_mask=mask)
    want = out_and_gradients([x.double() for x in inputs], "reference", key_padding_mask=mask)
    assert not found[0][0, :, 1].any()
    for got, expected in zip(found, want):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@EVERY_BACKEND
@pytest.mark.parametrize("kind", ["left", "right", "holes", "all"])
def test_padded_keys_may_hold_anything(kind, backend):
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[0, {"left": slice(4), "right": slice(6, 9), "holes": slice(1, 9, 3), "all": slice(9)}[kind]] = False
    q, k, v = rows(5, 9)
    vector = torch.randn(HEADS, 11, device=DEVICE)
    clean = out_and_gradients([q, k, v, vector], backend, key_padding_mask=mask)
    for bad in (float("nan"), float("inf")):
        k, v = (x.masked_fill(~mask[:, None, :, None], bad) for x in (k, v))
        for got, want in zip(out_and_gradients([q, k, v, vector], backend, key_padding_mask=mask), clean):
            torch.testing.assert_close(got, want)
        assert attention_weights(q, k, key_padding_mask=mask).isfinite().all()


@EVERY_BACKEND
def test_autocast_rounds_nothing(backend):
    q, k, v = rows(20, 30)
    want = attention(q, k, v, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = attention(q, k, v, backend=backend)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@EVERY_BACKEND
def test_boundaries_of_any_stride(backend):
    x = torch.randn(7, 2, 16, device=DEVICE)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32, device=DEVICE)
    wide = torch.stack([starts, starts + 100], dim=1)[:, 0]
    assert not wide.is_contiguous()
    outs = [
        attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=4, max_seqlen_k=4, backend=backend)
        for cu in (starts, wide)
    ]
    assert torch.equal(*outs)


@EVERY_BACKEND
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_at_all_has_gradients(packed, backend):
    """No batch rows, or no documents."""
    shape = (4, 2, 16) if packed else (0, 2, 4, 16)
    leaf, vector = torch.randn(shape, device=DEVICE, requires_grad=True), torch.randn(2, 7, device=DEVICE)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    options = {"cu_seqlens_q": none, "cu_seqlens_k": none, "max_seqlen_q": 4, "max_seqlen_k": 4} if packed else {}
    out = attention(leaf, leaf, leaf, bias=RelativeBias(vector.requires_grad_()), backend=backend, **options)
    out.sum().backward()
    assert not out.any()
    assert not leaf.grad.any()


@EVERY_BACKEND
@pytest.mark.parametrize("bias", ["none", "vector", pytest.param("dense", marks=pytest.mark.slow)])
def test_under_activation_checkpointing(bias, backend):
    """Recomputed in backward, with the same dropout."""
    leaves = [x.requires_grad_() for x in rows(10, 12)]
    if bias != "none":
        shape = (HEADS, 11) if bias == "vector" else (1, HEADS, 10, 12)
        leaves.append(torch.randn(shape, device=DEVICE, requires_grad=True))

    def attend(q, k, v, given=None):
        given = RelativeBias(given) if bias == "vector" else given
        return attention(q, k, v, bias=given, backend=backend, dropout_p=0.0 if backend == "sdpa" else 0.2)

    torch.manual_seed(1)
    want = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), leaves), want))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (1, 1)])
def test_flex_of_empty_sides(lengths):
    q, k, v = rows(*lengths)
    torch.testing.assert_close(attention(q, k, v, backend="flex"), attention(q, k, v, backend="reference"))


def test_shapes_are_known_on_the_meta_device():
    x = torch.empty(8, 2, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    out = attention(x, x, x, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=8, max_seqlen_k=8)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)


def test_shapes_are_known_of_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x, starts = torch.empty(8, 2, 16, requires_grad=True), torch.zeros(3, dtype=torch.int32)
        out = attention(x, x, x, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=8, max_seqlen_k=8)
        out.sum().backward()
    assert out.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_scratch_of_the_longest_document_is_enough_for_the_others(head_dim):
    """All documents of a call share scratch of the size that the longest asks for, and shorter ones may need more."""
    sizes = [forward_scratch(head_dim, length) for length in range(1, 9000)]
    assert sizes == sorted(sizes)


Q = torch.randn(2, 3, 5, 8)
ROWS = torch.randn(8, 2, 8)
STARTS = torch.tensor([0, 8], dtype=torch.int32)
BAD = {
    "key_padding_mask: expected the device of q": {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool).to("meta")},
    "key_padding_mask: expected a bool tensor": {"key_padding_mask": [[True] * 5] * 2},
    "scale: expected a number": {"scale": None},
    "dropout_p: expected a number": {"dropout_p": "0.1"},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(what):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(what)}"):
        attention(Q, Q, Q, **BAD[what])


@pytest.mark.parametrize("side", ["q", "k"])
def test_boundaries_are_tensors(side):
    options = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 8, "max_seqlen_k": 8}
    with pytest.raises(TypeError, match=f"^cu_seqlens_{side}: expected an int32 tensor"):
        attention(ROWS, ROWS, ROWS, **(options | {f"cu_seqlens_{side}": [0, 8]}))


@pytest.mark.parametrize("buckets", [1, 2, 3])
def test_too_few_buckets_are_named(buckets):
    with pytest.raises(ValueError, match=r"^weight: expected at least 4 buckets"):
        RelativeBias.from_table(torch.randn(buckets, 2), bidirectional=True, max_distance=128)
