"""Calls past the dispatcher: what the operators give, and the operators themselves where somebody listens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fat5.ops import RelativeBias, attention, geglu, rms_norm, use_kernels
from fat5.ops import eager as eager_module
from fat5.ops.attention import op
from fat5.ops.triton import geglu as triton_geglu
from fat5.ops.triton import rms_norm as triton_rms_norm
from fat5.ops.triton.launch import recording

STARTS = torch.tensor([0, 9, 20], dtype=torch.int32)


class Heard(TorchDispatchMode):
    """The names of our operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fat5":
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)


def attend(q, k, v, vector, **how):
    starts = STARTS.to(q.device)
    return attention(
        q, k, v, bias=RelativeBias(vector), cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=11, max_seqlen_k=11,
        backend="triton", **how,
    )  # fmt: skip


CALLS = {
    "attention": (attend, [(20, 2, 16)] * 3 + [(2, 7)], {"triton_work_lists", "attention", "attention_backward"}),
    "rms_norm": (rms_norm, [(5, 24), (24,)], {"triton_rms_norm", "triton_rms_norm_backward"}),
    "geglu": (geglu, [(5, 24), (5, 24)], {"triton_geglu", "triton_geglu_backward"}),
}


@pytest.fixture(autouse=True)
def _kernels_on():
    before = use_kernels("triton")
    yield
    use_kernels(before)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_the_operator(name, monkeypatch):
    call, shapes, operators = CALLS[name]
    inputs = [draw(*shape) for shape in shapes]
    upstream = draw(*shapes[0]).detach()
    alone = [call(*inputs)]
    alone += torch.autograd.grad(alone[0], inputs, upstream)
    with torch.no_grad():
        assert torch.equal(call(*inputs), alone[0])
    with Heard() as heard:
        observed = [call(*inputs)]
        observed += torch.autograd.grad(observed[0], inputs, upstream)
    assert set(heard.names) == operators
    for module in (op, triton_rms_norm, triton_geglu):
        monkeypatch.setattr(module, "is_unobserved", lambda *_: False)
    dispatched = [call(*inputs)]
    dispatched += torch.autograd.grad(dispatched[0], inputs, upstream)
    for one, two, three in zip(alone, observed, dispatched, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name):
    call, shapes, _ = CALLS[name]
    inputs = [draw(*shape) for shape in shapes]
    first = torch.autograd.grad(call(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


def test_who_listens(monkeypatch):
    x = torch.zeros(2)
    assert eager_module.is_unobserved(x, None, torch.nn.Parameter(x))
    assert torch.compile(lambda x: x + eager_module.is_unobserved(x), backend="eager")(x)[0] == 0
    seen = []
    torch.func.vmap(lambda y: seen.append(eager_module.is_unobserved(y)) or y)(torch.zeros(2, 2))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        seen.append(eager_module.is_unobserved(fake))
    seen.append(eager_module.is_unobserved(fake))
    assert seen == [False, False, False]


def test_calls_that_share_plan_once():
    q, k, v = (draw(20, 2, 16) for _ in range(3))
    one, two = draw(2, 7), draw(2, 7)
    apart = [attend(q, k, v, vector) for vector in (one, one, two)]
    starts, shared = STARTS.to(q.device), {}

    def together(vector, **how):
        return attention(
            q, k, v, bias=RelativeBias(vector), cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=11,
            max_seqlen_k=11, backend="triton", shared=shared, **how,
        )  # fmt: skip

    with recording(run=True) as launched:
        found = [together(vector) for vector in (one, one, two)]
        assert [entry.name for entry in launched].count("work_list") == 8, "four lists for each vector"
        together(one, causal=True)
        with torch.no_grad():
            together(one)
        assert [entry.name for entry in launched].count("work_list") == 13, "four when causal, one without gradients"
    assert all(map(torch.equal, found, apart))
    assert len(shared) == 4
