"""AdamWScale's Triton step against the specification in float64, interpreted where there is no GPU."""

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from fat5.ops import use_kernels
from fat5.optim import AdamWScale
from fat5.optim.adamw_scale import _plain_step

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The rule of all fast paths (CONTRIBUTING.md): twice the error of the plain form in the same precision.
RATIO = 2.0
# A share of the largest value, for weights on which the plain form happens to be exact: a few float32 roundings.
FLOOR = 1e-6
PRECISIONS = {
    "fp32": {"dtype": torch.float32},
    "bf16 Kahan": {"dtype": torch.bfloat16},
    "fp16 Kahan": {"dtype": torch.float16},
    "bf16 no Kahan": {"dtype": torch.bfloat16, "kahan": False},
    "fp32 Kahan": {"dtype": torch.float32, "kahan": True},
    "bf16 moment": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
    # Large enough that its place shows.
    "fp32, eps before": {"dtype": torch.float32, "eps": 0.1, "eps_before_correction": True},
    "bf16, eps before": {"dtype": torch.bfloat16, "eps": 0.1, "eps_before_correction": True},
}
REPEATED = {"fp32 Kahan", "bf16, eps before"}  # each part of them is in another row
# One element; odd, of three dimensions; a chunk of 16,384 exactly, and one element more (sizes of more are below).
SHAPES = [(1,), (3, 7, 5), (128, 128), (16385,)]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    before = use_kernels("adamw_scale=triton")
    yield
    use_kernels(before)


def problem(shapes, steps: int, dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    weights = [(0.3 * torch.randn(shape)).to(HERE, dtype) for shape in shapes]
    return weights, [[torch.randn(shape).to(HERE, dtype) for shape in shapes] for _ in range(steps)]


def train(weights, gradients, widen: bool = False, **options) -> tuple[list[Tensor], AdamWScale]:
    """Weights, and their compensations added, after steps with these gradients; all in float64 if `widen`."""
    parameters = [torch.nn.Parameter(w.double() if widen else w.clone()) for w in weights]
    optimizer = AdamWScale(parameters, **options)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return [_whole(p, optimizer) for p in parameters], optimizer


def _whole(parameter: Tensor, optimizer: AdamWScale) -> Tensor:
    lost = optimizer.state[parameter].get("compensation")
    return parameter.detach().double() + (0.0 if lost is None else lost.double())


def assert_as_good(shapes, dtype, steps=3, **options):
    weights, gradients = problem(shapes, steps, dtype)
    kept = {key: value for key, value in options.items() if key not in ("kahan", "state_dtype")}
    exact, _ = train(weights, gradients, widen=True, fused=False, **kept)
    plain, _ = train(weights, gradients, fused=False, **options)
    found, optimizer = train(weights, gradients, **options)
    assert all(optimizer._uses_triton(w) for w in optimizer._weights())
    for want, mild, got in zip(exact, plain, found, strict=True):
        allowed = RATIO * (mild - want).abs().max() + FLOOR * want.abs().max()
        assert (got - want).abs().max() <= allowed


@pytest.mark.parametrize(
    "options",
    [pytest.param(PRECISIONS[name], marks=[pytest.mark.slow] if name in REPEATED else []) for name in PRECISIONS],
    ids=PRECISIONS,
)
def test_follows_the_specification(options):
    assert_as_good(SHAPES, **options)
    assert_as_good([(33, 9)], **({"eps": 1e-3} | options), lr=0.3, betas=(0.5, 0.9), weight_decay=0.1)


@settings(max_examples=6, deadline=None)
@given(sizes=st.lists(st.integers(1, 40_000), min_size=1, max_size=4), decay=st.sampled_from([0.0, 0.1]))
def test_any_sizes(sizes, decay):
    assert_as_good([(size,) for size in sizes], torch.float32, steps=2, weight_decay=decay)


def test_states_are_those_of_the_specification():
    """Moments, compensation and count, which a checkpoint carries over to another path."""
    weights, gradients = problem([(40, 30)], 3, torch.bfloat16)
    found = train(weights, gradients)[1].state_dict()["state"][0]
    want = train(weights, gradients, fused=False)[1].state_dict()["state"][0]
    assert found["step"].item() == want["step"].item() == 3
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(found[name], want[name])
    # One ulp of an update's rounding is half of what is compensated.
    assert (found["compensation"] - want["compensation"]).abs().max() <= 2**-8 * weights[0].abs().max()


def test_kahan_adds_up_what_plain_rounding_loses():
    torch.manual_seed(0)
    weights = [(1 + 0.1 * torch.rand(32, 32)).to(HERE, torch.bfloat16)]
    gradients = [[torch.rand(32, 32, device=HERE)] for _ in range(30)]
    exact, _ = train(weights, gradients, widen=True, fused=False, lr=5e-5)
    found, _ = train(weights, gradients, lr=5e-5)
    lost, _ = train(weights, gradients, lr=5e-5, kahan=False)
    travelled = exact[0] - weights[0].double()
    # The gradients are rounded to bfloat16: 2^-9 relative at worst, and the compensation too.
    assert (found[0] - exact[0]).norm() <= 2e-2 * travelled.norm()
    assert (lost[0] - weights[0].double()).norm() < 0.2 * travelled.norm()


def test_a_change_of_path_goes_on_where_the_other_stopped():
    weights, gradients = problem([(9, 7), (5,)], 6, torch.float32)
    straight, _ = train(weights, gradients, fused=False)
    halfway, optimizer = train(weights, gradients[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    use_kernels("plain")
    resumed = [torch.nn.Parameter(w.float()) for w in halfway]
    restored = AdamWScale(resumed)
    restored.load_state_dict(saved)
    for n, step in enumerate(gradients[3:]):
        use_kernels("triton" if n == 1 else "plain")
        for parameter, gradient in zip(resumed, step, strict=True):
            parameter.grad = gradient
        restored.step()
    for want, got in zip(straight, resumed, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_found_inf_leaves_everything_untouched():
    weights, gradients = problem([(9, 7), (20000,)], 2, torch.bfloat16)
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = AdamWScale(parameters, weight_decay=0.1)
    assert optimizer.skips_on_device
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient
    optimizer.step()
    before = copy.deepcopy(([p.detach() for p in parameters], optimizer.state_dict()["state"]))
    optimizer.found_inf = torch.ones((), device=HERE)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before[0], parameters))
    for old, new in zip(before[1].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    optimizer.found_inf = torch.zeros((), device=HERE)
    for parameter, gradient in zip(parameters, gradients[1], strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before[0], parameters))


def test_what_the_kernel_does_not_serve_goes_the_plain_way():
    strided = torch.nn.Parameter(torch.randn(6, 8, device=HERE).t())
    parameters = [strided, torch.nn.Parameter(torch.randn(6, 8, device=HERE))]
    before = [p.detach().clone() for p in parameters]
    optimizer = AdamWScale(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not optimizer._uses_triton(strided)
    for old, new in zip(before, parameters):
        state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(old), "exp_avg_sq": torch.zeros_like(old)}
        want = old.clone()
        want.grad = torch.ones_like(old)
        _plain_step(want, state, optimizer.param_groups[0], False)
        torch.testing.assert_close(new.detach(), want)


@pytest.mark.parametrize("path", ["triton", "fused", "plain"])
def test_rows_of_a_matrix_take_the_rms_of_the_matrix(path, monkeypatch):
    """Two processes with three and two rows step as one with all five; a vector beside them is whole in each."""
    before = use_kernels("triton" if path == "triton" else "plain")
    try:
        generator = torch.Generator().manual_seed(0)
        matrix, vector, gradient, other = (
            torch.randn(*shape, generator=generator).to(HERE) for shape in ((5, 8), (8,), (5, 8), (8,))
        )
        matrix[:3] *= 10  # the halves alone have another RMS

        def stepped(*weights_and_gradients):
            parameters = [torch.nn.Parameter(weight.clone()) for weight, _ in weights_and_gradients]
            if len(weights_and_gradients[0][0]) != 5:
                mesh = SimpleNamespace(ndim=1, get_group=lambda dimension: "group")
                parameters[0].rows_of = SimpleNamespace(device_mesh=mesh, numel=lambda: 40)
            optimizer = AdamWScale(parameters, fused=False if path == "plain" else None)
            for parameter, (_, own) in zip(parameters, weights_and_gradients, strict=True):
                parameter.grad = own.clone()
            optimizer.step()
            return [parameter.detach() for parameter in parameters]

        whole, moved = stepped((matrix, gradient), (vector, other))
        for rows, rest in ((slice(0, 3), slice(3, 5)), (slice(3, 5), slice(0, 3))):

            def all_reduce(squares, group):
                assert group == "group"
                squares += matrix[rest].square().sum()  # noqa: B023

            monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
            part, same = stepped((matrix[rows], gradient[rows]), (vector, other))
            torch.testing.assert_close(part, whole[rows])
            torch.testing.assert_close(same, moved)
    finally:
        use_kernels(before)
