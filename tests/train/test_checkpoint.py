"""The store's rules, and that every part of a state comes back as it was."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from fat5.errors import CheckpointError
from fat5.optim import OptimizerConfig, build_optimizer
from fat5.train.checkpoint import generators, state
from fat5.train.checkpoint.files import write_checkpoint
from fat5.train.checkpoint.state import to_text
from fat5.train.checkpoint.store import CheckpointStore, Saver, Snapshot


def snapshot(step, loss=None):
    return Snapshot(step, {"model.safetensors": {"w": torch.full((3,), step)}}, {"trainer.json": "{}"}, loss)


def saved(folder, losses, **rules):
    store = CheckpointStore(folder, **rules)
    for step, loss in losses.items():
        store.save(snapshot(step, loss))
    return store


def test_keeps_last_best_and_every(tmp_path):
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: None, 6: 4.5, 7: None}
    assert saved(tmp_path, losses, keep_last=2, keep_best=1, keep_every=4).steps() == [2, 4, 6, 7]
    assert saved(tmp_path / "b", losses, keep_last=1, keep_best=0).steps() == [7]
    assert saved(tmp_path / "c", losses, keep_last=1, keep_best=2).steps() == [2, 4, 7]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_ones(tmp_path):
    """The run went back from a damaged step 9; saving step 5 with keep_last 1 must keep step 5."""
    store = saved(tmp_path, {9: None}, keep_last=1, keep_best=0)
    (tmp_path / "step-9" / "model.safetensors").write_bytes(b"damage")
    store = saved(tmp_path, {5: None}, keep_last=1, keep_best=0)
    assert store.steps() == [5, 9]
    assert store.choose().folder.name == "step-5"
    saved(tmp_path, {9: None}, keep_last=1, keep_best=0)
    assert store.choose().folder.name == "step-9"


def test_other_names_are_no_checkpoints(tmp_path):
    store = saved(tmp_path, {3: None})
    for name in ("step-x", "step-", ".writing-step-9", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-8").write_text("a file")
    assert store.steps() == [3]
    assert store.sweep() == [".writing-step-9"]


def test_an_empty_store_has_no_choice(tmp_path):
    assert CheckpointStore(tmp_path / "nothing").choose() is None


def test_saving_does_not_wait_and_does_not_see_later_training(tmp_path):
    weight = nn.Parameter(torch.zeros(1000, 1000))
    model = nn.ParameterDict({"w": weight})
    taken = [Snapshot(1, {"model.safetensors": state.capture_weights(model)}, {}, None)]
    saver = Saver(CheckpointStore(tmp_path), taken.pop, pytest.fail)
    saver.save()
    with torch.no_grad():
        weight.fill_(1.0)
    saver.finish()
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "step-1" / "model.safetensors")["w"], torch.zeros(1000, 1000))


class Tied(nn.Module):
    """Two names for one weight, as T5's embeddings have."""

    def __init__(self, width=8):
        super().__init__()
        self.shared = nn.Embedding(16, width)
        self.wi = nn.Linear(width, 16, bias=False)
        self.lm_head = nn.Linear(width, 16, bias=False)
        self.lm_head.weight = self.shared.weight


@pytest.mark.parametrize("name", ["adamw_scale", "adamw", "adafactor", "muon", "lamb"])
def test_weights_and_optimizer_come_back(tmp_path, name):
    if name == "lamb":
        pytest.importorskip("pytorch_optimizer")

    def made():
        model = Tied()
        return model, build_optimizer(OptimizerConfig(name=name), model)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    model, optimizer = made()
    steps(model, optimizer, range(3))
    tensors, facts = state.capture_optimizer(optimizer, model)
    weights = state.capture_weights(model)
    assert list(weights) == ["shared.weight", "wi.weight"]
    files = {state.WEIGHTS: weights, state.OPTIMIZER: tensors}
    write_checkpoint(tmp_path / "step-3", files, {state.OPTIMIZER_FACTS: to_text(facts)}, {})
    twin, restored = made()
    state.restore_weights(twin, tmp_path / "step-3")
    state.restore_optimizer(restored, twin, tmp_path / "step-3")
    steps(model, optimizer, range(3, 6))
    steps(twin, restored, range(3, 6))
    for (key, one), two in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    odd = [(label, torch.zeros(*tensor.shape, 2)) for label, tensor in tensors.items()]
    odd += [(label, tensor.int()) for label, tensor in tensors.items()]
    for label, tensor in odd:
        files[state.OPTIMIZER] = tensors | {label: tensor}
        write_checkpoint(tmp_path / "step-3", files, {state.OPTIMIZER_FACTS: to_text(facts)}, {})
        other, fresh = made()
        with pytest.raises(CheckpointError, match=f"{label} differs, being"):
            state.restore_optimizer(fresh, other, tmp_path / "step-3")


def test_a_checkpoint_from_before_bias_tables_had_a_group(tmp_path):
    def made():
        torch.manual_seed(0)
        model = Tied()
        model.relative_attention_bias = torch.nn.Embedding(4, 2)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        return model, build_optimizer(OptimizerConfig(), model)

    model, optimizer = made()
    optimizer.step()
    tensors, facts = state.capture_optimizer(optimizer, model)
    assert len(facts["groups"]) == 2
    files = {state.WEIGHTS: state.capture_weights(model), state.OPTIMIZER: tensors}
    for groups in (facts["groups"][:1], facts["groups"] * 2):
        write_checkpoint(tmp_path / "step-1", files, {state.OPTIMIZER_FACTS: to_text(facts | {"groups": groups})}, {})
        twin, restored = made()
        state.restore_weights(twin, tmp_path / "step-1")
        if len(groups) > 2:
            with pytest.raises(CheckpointError, match="belongs to another model"):
                state.restore_optimizer(restored, twin, tmp_path / "step-1")
            continue
        state.restore_optimizer(restored, twin, tmp_path / "step-1")
        optimizer.step()
        restored.step()
        for (key, one), two in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.equal(one, two), key


def test_another_model_is_refused(tmp_path):
    write_checkpoint(tmp_path / "step-1", {state.WEIGHTS: state.capture_weights(Tied())}, {}, {})
    with pytest.raises(CheckpointError, match=r"shared\.weight is \(16, 8\) torch\.float32 there and \(16, 4\)"):
        state.restore_weights(Tied(width=4), tmp_path / "step-1")
    with pytest.raises(CheckpointError, match=r"belongs to another model: .* is in only one of them"):
        state.restore_weights(nn.Linear(2, 2), tmp_path / "step-1")


def test_random_generators_come_back(tmp_path):
    def draw():
        return random.gauss(0, 1), np.random.standard_normal(), torch.randn(3).tolist(), random.random()

    draw()  # leaves the second half of a Gaussian pair behind in Python and NumPy
    tensors, facts = generators.capture_random_state()
    write_checkpoint(tmp_path / "step-1", {"rng.safetensors": tensors}, {"rng.json": to_text(facts)}, {})
    expected = draw()
    draw()
    generators.restore_random_state(tmp_path / "step-1")
    assert draw() == expected


def test_generators_that_the_manifest_does_not_name_do_not_count(tmp_path):
    tensors, facts = generators.capture_random_state()
    pairs = [generators.rng_files(rank) for rank in range(3)]
    folder = tmp_path / "step-1"
    write_checkpoint(
        folder, {name: tensors for name, _ in pairs[:2]}, {name: to_text(facts) for _, name in pairs[:2]}, {"step": 1}
    )
    for old, new in zip(pairs[0], pairs[2], strict=True):
        (folder / new).write_bytes((folder / old).read_bytes())
    assert generators.count_processes(folder) == 2
    generators.restore_generators(folder, 2, seed=5, step=1)
    drawn = torch.rand(1)
    generators.seed_generators(5, 1, 2)
    assert torch.equal(torch.rand(1), drawn), "rank 2 starts from a hash of seed, step and rank"
