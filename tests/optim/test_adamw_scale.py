"""AdamWScale against its formula in float64 and against torch's AdamW, on every implementation."""

import copy
import math

import pytest
import torch

from fat5.optim import AdamWScale

SHAPES = [(7, 5), (5,), (64, 33), (3, 4, 2)]
IMPLEMENTATIONS = {"plain": {"fused": False}, "fused": {"fused": True}}
FLOAT32_RATIO = 1e-5  # a few dozen float32 roundings over 20 steps
implementations = pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())


def weights_and_gradients(steps: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in SHAPES]
    gradients = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in range(steps)
    ]
    return [w.to(dtype) for w in weights], [[g.to(dtype) for g in step] for step in gradients]


def run(optimizer_class, weights, gradients, **options):
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = optimizer_class(parameters, **options)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameters, optimizer


def formula(weight, gradients, lr, betas, eps, decay, eps_before_correction=False):
    """The update, scalar arithmetic in float64, straight from the module's docstring."""
    weight, m, v = weight.double().clone(), torch.zeros(weight.shape).double(), torch.zeros(weight.shape).double()
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient.double()
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        scale = max(1e-3, math.sqrt((weight**2).mean().item()))
        correction1, correction2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        if eps_before_correction:  # as the first FAT5 writes it
            step = m / correction1 * math.sqrt(correction2) / (v.sqrt() + eps)
        else:
            step = m / correction1 / ((v / correction2).sqrt() + eps)
        weight = weight - lr * decay * weight - lr * scale * step
    return weight


def assert_close(name, expected, actual, ratio):
    error = (expected.double() - actual.double()).norm() / expected.double().norm()
    assert error <= ratio, f"{name}: relative error {error:.2e} above {ratio:.0e}"


@implementations
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_follows_the_formula(options, decay):
    weights, gradients = weights_and_gradients(20, torch.float32)
    settings = {"lr": 2e-2, "betas": (0.9, 0.99), "eps": 1e-6}
    parameters, _ = run(AdamWScale, weights, gradients, weight_decay=decay, **settings, **options)
    for index, parameter in enumerate(parameters):
        expected = formula(weights[index], [step[index] for step in gradients], *settings.values(), decay)
        assert_close(f"weight {index}", expected, parameter, FLOAT32_RATIO)


@pytest.mark.parametrize("options", [{"fused": False}, {}], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_eps_before_the_correction_follows_its_formula(options, size):
    """Also where nothing is chosen, which would be torch's fused step."""
    weights, gradients = weights_and_gradients(20, torch.float32)
    gradients = [[size * gradient for gradient in step] for step in gradients]
    settings = {"lr": 2e-2, "betas": (0.9, 0.999), "eps": 1e-6}
    parameters, _ = run(AdamWScale, weights, gradients, eps_before_correction=True, **settings, **options)
    for index, parameter in enumerate(parameters):
        expected = formula(weights[index], [step[index] for step in gradients], *settings.values(), 0.0, True)
        assert_close(f"weight {index}", expected, parameter, FLOAT32_RATIO)


def test_how_far_the_two_forms_of_eps_lie_apart():
    """The first step with gradients of 1e-4, as docs/optimizers.md has it: (1e-4 + 1e-6) / (1e-4 + 1e-6 / √0.001)."""
    steps = []
    for before in (False, True):
        parameter = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
        parameter.grad = torch.full_like(parameter, 1e-4)
        AdamWScale([parameter], eps_before_correction=before).step()
        steps.append(1 - parameter[0, 0].item())
    assert steps[1] / steps[0] == pytest.approx((1e-4 + 1e-6) / (1e-4 + 1e-6 / math.sqrt(0.001)))
    assert steps[1] / steps[0] == pytest.approx(0.767, abs=5e-4)


def test_torch_s_fused_step_has_the_other_form():
    with pytest.raises(ValueError, match="fused adds eps after the bias correction"):
        AdamWScale([torch.nn.Parameter(torch.ones(2, 2))], fused=True, eps_before_correction=True)


@implementations
def test_is_torch_adamw_where_the_scale_is_one(options):
    """With the least scale put above every RMS, a step is AdamW's at lr · that scale."""
    weights, gradients = weights_and_gradients(20, torch.float32)
    ours, _ = run(AdamWScale, weights, gradients, lr=1e-2, weight_decay=0.4, min_scale=4.0, **options)
    theirs, _ = run(torch.optim.AdamW, weights, gradients, lr=4e-2, eps=1e-6, weight_decay=0.1)
    for index, (expected, actual) in enumerate(zip(theirs, ours, strict=True)):
        assert_close(f"weight {index}", expected, actual, FLOAT32_RATIO)


def test_a_zero_matrix_can_move():
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    parameter.grad = torch.ones(4, 4)
    AdamWScale([parameter], lr=1.0).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), -1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kahan_follows_float32_where_plain_rounding_stalls(dtype):
    """Steps far below half a unit in the last place: with Kahan they add up, without they vanish."""
    torch.manual_seed(0)
    weights = [(1 + 0.1 * torch.rand(32, 32)).to(dtype)]
    gradients = [[torch.rand(32, 32)] for _ in range(200)]
    settings = {"lr": 5e-5, "weight_decay": 0.1, "fused": False}
    exact, _ = run(AdamWScale, [weights[0].float()], gradients, **settings)
    kahan, optimizer = run(AdamWScale, weights, gradients, **settings)
    plain, _ = run(AdamWScale, weights, gradients, kahan=False, **settings)
    travelled = (exact[0] - weights[0].float()).detach()
    assert optimizer.state[kahan[0]]["compensation"].dtype == dtype
    recovered = (kahan[0].float() + optimizer.state[kahan[0]]["compensation"].float() - weights[0].float()).detach()
    # The gradients too are rounded to the weight's dtype: 2^-9 relative at worst.
    assert_close("travelled with Kahan", travelled, recovered, 2e-2)
    assert (plain[0].float() - weights[0].float()).norm() < 0.2 * travelled.norm()


def test_the_second_moment_stays_wide_and_decays():
    """In bf16 0.999·v rounds back to v, and a spike would never be forgotten."""
    parameter = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = AdamWScale([parameter], state_dtype=torch.bfloat16)
    for size in (100.0, *[0.0] * 200):
        parameter.grad = torch.full((8, 8), size, dtype=torch.bfloat16)
        optimizer.step()
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((8, 8), 1e4 * 1e-3 * 0.999**200), rtol=1e-3, atol=0)


def test_state_dtype_is_close_to_full_width():
    weights, gradients = weights_and_gradients(20, torch.float32)
    wide, _ = run(AdamWScale, weights, gradients)
    narrow, optimizer = run(AdamWScale, weights, gradients, state_dtype=torch.bfloat16)
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    for index, (expected, actual) in enumerate(zip(wide, narrow, strict=True)):
        travelled = expected.detach() - weights[index]
        assert_close(f"weight {index}", travelled, actual.detach() - weights[index], 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [*IMPLEMENTATIONS.values(), {}], ids=[*IMPLEMENTATIONS, "auto"])
def test_state_dict_round_trip_continues_bit_for_bit(dtype, options):
    if dtype == torch.bfloat16 and options.get("fused"):
        with pytest.raises(ValueError, match="fused needs contiguous float32"):
            AdamWScale([torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))], **options)
        return
    weights, gradients = weights_and_gradients(10, dtype)
    straight, _ = run(AdamWScale, weights, gradients, **options)
    halfway, optimizer = run(AdamWScale, weights, gradients[:5], **options)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [torch.nn.Parameter(weight.detach().clone()) for weight in halfway]
    restored = AdamWScale(resumed, **options)
    restored.load_state_dict(saved)
    for state, parameter in zip(saved["state"].values(), resumed, strict=True):
        for key, value in state.items():
            assert restored.state[parameter][key].dtype == value.dtype, key
    for step in gradients[5:]:
        for parameter, gradient in zip(resumed, step, strict=True):
            parameter.grad = gradient
        restored.step()
    for expected, actual in zip(straight, resumed, strict=True):
        assert torch.equal(expected, actual)


def test_parameters_without_gradient_stay_and_catch_up():
    first, second = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = AdamWScale([first, second], lr=0.1, fused=False)
    first.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(second, torch.ones(3, 3))
    second.grad = torch.ones(3, 3)
    optimizer.step()
    # Its first step is bias-corrected as a first step: the full relative rate.
    torch.testing.assert_close(second.detach(), torch.full((3, 3), 0.9), rtol=1e-5, atol=0)


def test_found_inf_leaves_everything_untouched():
    weights, gradients = weights_and_gradients(3, torch.float32)
    parameters, optimizer = run(AdamWScale, weights, gradients, weight_decay=0.1)
    assert optimizer.skips_on_device
    before = [parameter.detach().clone() for parameter in parameters]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf = torch.ones(())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    for expected, actual in zip(before, parameters, strict=True):
        assert torch.equal(expected, actual)
    for index, saved in state.items():
        for key, value in saved.items():
            assert torch.equal(value, optimizer.state_dict()["state"][index][key]), key
    optimizer.found_inf = torch.zeros(())
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert not torch.equal(before[0], parameters[0])


def test_found_inf_is_refused_where_it_would_be_ignored():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = AdamWScale([parameter], fused=False)
    optimizer.found_inf = torch.ones(())
    parameter.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="fused and Triton paths only"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 2))


def test_closure_is_called():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = AdamWScale([parameter])

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (parameter < 1).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"eps": float("nan")}, "eps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"state_dtype": torch.int32}, "state_dtype"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        AdamWScale([torch.nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize(
    ("of", "layout"),
    [
        ("weight", "columns first"), ("weight", "part of a row"),
        ("gradient", "columns first"), ("gradient", "part of a row"), ("gradient", "expanded"),
    ],
)  # fmt: skip
def test_memory_layout_changes_nothing(of, layout):
    """A gradient that was assigned may lie in memory otherwise than its weight."""

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        if layout == "columns first":
            return x.t().contiguous().t()
        if layout == "part of a row":
            return torch.cat([x, x], dim=1)[:, : x.shape[1]]
        return x[:, :1].expand_as(x)

    def stepped(**options):
        torch.manual_seed(0)
        weight, gradient = torch.randn(6, 4), torch.randn(6, 4)
        if of == "weight":
            weight = laid_out(weight)
        else:
            gradient = laid_out(gradient)
        parameter = torch.nn.Parameter(weight)
        optimizer = AdamWScale([parameter], lr=0.1, **options)
        for _ in range(3):
            parameter.grad = gradient
            optimizer.step()
        return parameter.detach()

    torch.testing.assert_close(stepped(), stepped(fused=False))
