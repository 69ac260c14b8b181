"""State in the host's memory: the numbers, the checkpoint and the groups are those of the optimizer alone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fat5.errors import ConfigurationError
from fat5.optim import OffloadedOptimizer, OptimizerConfig, build_optimizer, offload
from fat5.train.checkpoint import state
from fat5.train.checkpoint.files import write_checkpoint
from fat5.train.checkpoint.state import to_text


class Widths(nn.Module):
    """Matrices of several sizes, a norm and a bias table; two of them fill a chunk, one is larger than that."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(40, 8)
        self.layer_norm = nn.Parameter(torch.ones(8))
        self.relative_attention_bias = nn.Embedding(4, 2)
        self.wi, self.wo, self.lm_head = (nn.Linear(*size, bias=False) for size in ((8, 8), (8, 16), (8, 40)))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "CHUNK", 200)


Made = tuple[nn.Module, torch.optim.Optimizer]


def pair(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Made]:
    """A model with its optimizer alone, and the same offloaded."""
    made = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        model = Widths().to(device, dtype)
        optimizer = build_optimizer(OptimizerConfig(name=name), model)  # type: ignore[arg-type]
        made.append((model, OffloadedOptimizer(optimizer) if offloaded else optimizer))
    return made


def make_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, without: str = "") -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            gradient = torch.randn(weight.shape, generator=generator).to(weight)
            weight.grad = None if name == without else gradient
        optimizer.step()


def assert_equal(one: Made, other: Made) -> None:
    mine, its = (state.capture_optimizer(optimizer, model) for model, optimizer in (one, other))
    assert mine[1] == its[1]
    for tensors in (mine[0], its[0]), (one[0].state_dict(), other[0].state_dict()):
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    state.restore_weights(model, folder)
    state.restore_optimizer(optimizer, model, folder)


SAME = [
    *((name, torch.float32) for name in ("adamw_scale", "adamw", "adafactor", "muon")),
    ("adamw_scale", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dtype"), SAME)
def test_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    alone, offloaded = pair(name, dtype)
    for one in (alone, offloaded):
        make_steps(*one, range(2), without="wo.weight")
        make_steps(*one, range(2, 6))
    assert_equal(alone, offloaded)
    assert len(offloaded[1]._chunks) > offload.BUFFERS  # type: ignore[attr-defined]


def test_state_stays_at_home_between_steps() -> None:
    _, (model, optimizer) = pair("adamw_scale")
    make_steps(model, optimizer, range(3))
    homes = [chunk.host for chunk in optimizer._chunks]  # type: ignore[attr-defined]
    inside = {(home.data_ptr(), home.data_ptr() + home.numel()) for home in homes}
    for weight in model.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            pointer = optimizer.state[weight][key].data_ptr()
            assert any(start <= pointer < stop for start, stop in inside)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


@pytest.mark.parametrize("name", ["adamw_scale", "adamw"])
def test_checkpoints_of_either_continue_as_the_other(tmp_path, name: str) -> None:
    alone, offloaded = pair(name)
    for one in (alone, offloaded):
        make_steps(*one, range(3))
    tensors, facts = state.capture_optimizer(offloaded[1], offloaded[0])
    files = {state.WEIGHTS: state.capture_weights(offloaded[0]), state.OPTIMIZER: tensors}
    write_checkpoint(tmp_path / "step-3", files, {state.OPTIMIZER_FACTS: to_text(facts)}, {})
    make_steps(*alone, range(3, 5))
    for fresh in pair(name):
        restore(*fresh, tmp_path / "step-3")
        make_steps(*fresh, range(3, 5))
        assert_equal(alone, fresh)
    # A run that goes back: the state of a checkpoint replaces that of later steps.
    restore(*offloaded, tmp_path / "step-3")
    make_steps(*offloaded, range(3, 5))
    assert_equal(alone, offloaded)


def test_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ConfigurationError, match=r"optimizer\.offload is true, and layer_norm is on cpu"):
        build_optimizer(OptimizerConfig(offload=True), Widths())
    with pytest.raises(ConfigurationError, match="lamb counts the steps"):
        OptimizerConfig(name="lamb", offload=True).resolved()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw_scale", "adamw"])
def test_the_same_numbers_on_a_gpu(name: str) -> None:
    alone, offloaded = pair(name, device="cuda")
    for one in (alone, offloaded):
        one[1].found_inf, one[1].grad_scale = torch.zeros((), device="cuda"), None  # type: ignore[attr-defined]
        make_steps(*one, range(4))
        one[1].found_inf = torch.ones((), device="cuda")  # type: ignore[attr-defined]
        make_steps(*one, range(4, 5))
        one[1].found_inf = torch.zeros((), device="cuda")  # type: ignore[attr-defined]
        make_steps(*one, range(5, 9))
    assert_equal(alone, offloaded)
    assert all(chunk.host.is_pinned() for chunk in offloaded[1]._chunks)  # type: ignore[attr-defined]
