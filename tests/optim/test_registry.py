"""Optimizers by name: each learns, groups its weights, refuses foreign keys, and goes through a save."""

import copy
import sys

import pytest
import torch
from torch import nn

from fat5.errors import ConfigurationError
from fat5.optim import OptimizerConfig, build_optimizer, skips_on_device
from fat5.optim.registry import CombinedOptimizer

NAMES = ["adamw_scale", "adamw", "adafactor", "muon", "lamb"]


class Tiny(nn.Module):
    """Parameter names as in T5: embedding, a norm, a bias table, a hidden matrix, a head."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(16, 8)
        self.layer_norm = nn.Parameter(torch.ones(8))
        self.relative_attention_bias = nn.Embedding(4, 2)
        self.wi = nn.Linear(8, 8, bias=False)
        self.lm_head = nn.Linear(8, 16, bias=False)

    def forward(self, ids):
        hidden = torch.tanh(self.wi(self.shared(ids))) * self.layer_norm
        return self.lm_head(hidden) + self.relative_attention_bias.weight.sum()


def loss_of(model):
    ids = torch.arange(16)
    return nn.functional.cross_entropy(model(ids), (ids * 3) % 16)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return loss_of(model).item()


@pytest.mark.parametrize("name", NAMES)
def test_each_learns(name):
    pytest.importorskip("pytorch_optimizer") if name == "lamb" else None
    torch.manual_seed(0)
    model = Tiny()
    before = loss_of(model).item()
    rates = {"lamb": 2e-2, "adamw": 1e-2}
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=rates.get(name)), model)
    after = train(model, optimizer, 60)
    assert after < 0.5 * before, f"{before:.3f} to {after:.3f}"


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_biases_do_not_decay(name):
    pytest.importorskip("pytorch_optimizer") if name == "lamb" else None
    model = Tiny()
    optimizer = build_optimizer(OptimizerConfig(name=name, weight_decay=0.1), model)
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert len(decay) == 5
    spared = [model.layer_norm, model.relative_attention_bias.weight]
    assert [decay[id(weight)] for weight in spared] == [0.0, 0.0]
    assert [decay[id(weight)] for weight in (model.shared.weight, model.wi.weight, model.lm_head.weight)] == [0.1] * 3


def test_a_bias_table_moves_by_the_rate_itself():
    """A step of AdamW's first is its rate: lr for the table, lr times the RMS for a matrix."""
    model = Tiny()
    moved = (model.relative_attention_bias.weight, model.wi.weight)
    for weight in moved:
        nn.init.constant_(weight, 0.5)
        weight.grad = torch.ones_like(weight)
    build_optimizer(OptimizerConfig(lr=0.02), model).step()
    for weight, value in zip(moved, (0.48, 0.49), strict=True):
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, value), atol=1e-6, rtol=0)


def test_the_place_of_eps_is_a_key_of_adamw_scale():
    steps = []
    for before in (None, True):
        model = Tiny()
        nn.init.constant_(model.wi.weight, 0.5)
        model.wi.weight.grad = torch.full((8, 8), 1e-4)
        build_optimizer(OptimizerConfig(lr=0.02, eps_before_correction=before), model).step()
        steps.append(0.5 - model.wi.weight[0, 0].item())
    assert steps[1] / steps[0] == pytest.approx(0.767, abs=1e-3)
    with pytest.raises(ConfigurationError, match=r"optimizer\.eps_before_correction is set, and muon does not take it"):
        build_optimizer(OptimizerConfig(name="muon", eps_before_correction=True), Tiny())


def test_muon_takes_the_hidden_matrices_only():
    model = Tiny()
    optimizer = build_optimizer(OptimizerConfig(name="muon"), model)
    assert isinstance(optimizer, CombinedOptimizer)
    assert [id(w) for w in optimizer.optimizers[0].param_groups[0]["params"]] == [id(model.wi.weight)]
    assert optimizer.param_groups[0]["peak_lr"] == 1e-3
    assert optimizer.param_groups[1]["peak_lr"] == 2e-2


def test_combined_optimizer_saves_and_restores():
    torch.manual_seed(0)
    model = Tiny()
    optimizer = build_optimizer(OptimizerConfig(name="muon"), model)
    train(model, optimizer, 3)
    twin = Tiny()
    twin.load_state_dict(model.state_dict())
    restored = build_optimizer(OptimizerConfig(name="muon"), twin)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors otherwise
    assert train(model, optimizer, 3) == train(twin, restored, 3)


def test_fused_optimizers_skip_on_the_device():
    assert skips_on_device(build_optimizer(OptimizerConfig(), Tiny()))
    assert skips_on_device(build_optimizer(OptimizerConfig(name="adamw"), Tiny()))
    assert not skips_on_device(build_optimizer(OptimizerConfig(), Tiny().bfloat16()))
    assert not skips_on_device(build_optimizer(OptimizerConfig(name="muon"), Tiny()))


def test_torch_adamw_honours_the_device_flag():
    model = Tiny()
    optimizer = build_optimizer(OptimizerConfig(name="adamw"), model)
    train(model, optimizer, 2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    train(model, optimizer, 1)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_resolved_fills_in_the_defaults_of_the_named_optimizer():
    assert OptimizerConfig().resolved().lr == 2e-2
    assert OptimizerConfig(name="adamw").resolved().lr == 1e-3
    assert OptimizerConfig(name="adamw").resolved().hidden_lr is None
    assert OptimizerConfig(name="muon", lr=0.5).resolved().lr == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adafactor", "betas": (0.9, 0.99)}, "optimizer.betas is set, and adafactor does not take it"),
        ({"name": "adamw", "kahan": True}, "optimizer.kahan is set"),
        ({"hidden_lr": 1.0}, "optimizer.hidden_lr is set"),
        ({"lr": -1.0}, "optimizer.lr is -1.0"),
        ({"lr": float("inf")}, "optimizer.lr is inf"),
        ({"eps": float("nan")}, "optimizer.eps is nan"),
        ({"betas": (0.9, 1.0)}, "decay of 1.0"),
    ],
)
def test_foreign_keys_and_bad_values_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        build_optimizer(OptimizerConfig(**settings), Tiny())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'fat5\[optim\]'"):
        build_optimizer(OptimizerConfig(name="lamb"), Tiny())
