"""The embedding's gradient: right, and without atomic additions once compiled, whose order changes from run to run."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.ops import embedding
from made_run import TINY

ATOMIC = ("index_put", "scatter_add", "scatter_reduce", "index_add", "embedding_dense_backward")


def compiled_operations(function, *arguments, **keywords) -> set[str]:
    """Names of the operations that torch.compile's backend gets, forward and backward, decomposed as Inductor does."""
    names: set[str] = set()

    def collect(graph, _):
        names.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect, decompositions=select_decomp_table())
    torch.compile(function, backend=backend, fullgraph=True)(*arguments, **keywords).backward()
    return names


def atomic(names: set[str]) -> set[str]:
    return {name for name in names if any(part in name for part in ATOMIC)}


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient(compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (40,), generator=generator)  # each row several times, row 7 never
    weight = torch.randn(8, 16, generator=generator, requires_grad=True)
    upstream = torch.randn(40, 16, generator=generator)
    function = torch.compile(embedding, backend="aot_eager", fullgraph=True) if compiled else embedding
    out = function(ids, weight)
    out.backward(upstream)
    exact = torch.zeros(8, 16, dtype=torch.float64)
    for row, gradient in zip(ids.tolist(), upstream.double(), strict=True):
        exact[row] += gradient
    assert torch.equal(out, F.embedding(ids, weight))
    torch.testing.assert_close(weight.grad.double(), exact, rtol=0, atol=1e-5)


SLOW = [pytest.param(positions, marks=pytest.mark.slow) for positions in ("rope", "alibi")]


@pytest.mark.parametrize("positions", ["t5", "absolute", *SLOW])
def test_a_compiled_step_adds_nothing_by_atomics(positions: str) -> None:
    plain = compiled_operations(
        lambda w: F.embedding(torch.tensor([1, 1]), w).sum(), torch.ones(4, 8, requires_grad=True)
    )
    assert atomic(plain), "the test no longer sees what it looks for"
    torch.manual_seed(0)
    model = FAT5ForConditionalGeneration(FAT5Config(**TINY | {"vocab_size": 64, "position_encoding": positions}))
    starts = torch.tensor([0, 20, 32], dtype=torch.int32)
    ids, labels = torch.randint(3, 64, (2, 32))
    packed = dict(input_ids=ids, labels=labels, cu_seqlens=starts, decoder_cu_seqlens=starts)
    names = compiled_operations(lambda: model(**packed, max_seqlen=20, decoder_max_seqlen=20).loss)
    assert "fat5.embedding_gradient.default" in names
    assert not atomic(names)


@pytest.mark.gpu
def test_compiled_gradients_are_equal_bit_for_bit() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (16384,), device="cuda")
    upstream = torch.randn(16384, 512, device="cuda")
    weight = torch.randn(32768, 512, device="cuda", requires_grad=True)
    function = torch.compile(embedding, fullgraph=True)
    gradients = [torch.autograd.grad(function(ids, weight), weight, upstream)[0] for _ in range(5)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])
