"""Sizes that a configuration leaves open: a step takes in the examples that were asked for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fat5.errors import ConfigurationError
from fat5.tasks.finetune.config import FinetuneConfig, TaskData
from fat5.tasks.finetune.examples import ExampleLoader, ExampleSet, ExampleStream
from fat5.tasks.finetune.sizes import LARGEST_PACK_CPU, choose_sizes, examples_a_step
from fat5.train.world import World

CPU = World(torch.device("cpu"))


def made(mean, count=1500, longest=900):
    """Examples of lengths as texts have them: many short ones, few long ones."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(mean), 0.6, (count, 2)), 4, longest).astype(np.int64)
    targets = [np.ones(length, np.int64) for length in lengths[:, 1]]
    return ExampleSet.of([np.ones(length, np.int64) for length in lengths[:, 0]], targets, [0] * count)


def chosen(examples, tmp_path, kind="text", world=CPU, **data):
    split = SimpleNamespace(examples=examples)
    config = FinetuneConfig(output_dir=str(tmp_path / "run"), model="m", data=TaskData(train=["t"], **data))
    return choose_sizes(config, SimpleNamespace(kind=kind), split, [split], world)


@pytest.mark.parametrize("mean", [30, 60, 200])
@pytest.mark.parametrize("batch_size", [16, 32, 128])
def test_a_step_has_the_examples_asked_for(mean, batch_size, tmp_path):
    examples = made(mean)
    config, batch = chosen(examples, tmp_path, batch_size=batch_size)
    assert batch.encoder_tokens <= LARGEST_PACK_CPU
    loader = iter(ExampleLoader(ExampleStream(examples, 0, 0, "hash"), batch))
    steps = 200
    found = sum(next(loader).num_examples for _ in range(steps * batch.packs_per_step)) / steps
    assert found == pytest.approx(examples_a_step(batch, examples), rel=0.02)
    # A pack is a multiple of 128 tokens.
    coarse = 64 / (mean * batch_size / batch.packs_per_step)
    assert found == pytest.approx(batch_size, rel=0.05 + coarse)
    assert config.steps == pytest.approx(config.epochs * len(examples) / found, rel=0.03)


def test_a_few_examples_are_no_more_a_step(tmp_path):
    examples = made(20, count=10, longest=30)
    _, batch = chosen(examples, tmp_path, batch_size=64)
    assert examples_a_step(batch, examples) == 10 * batch.packs_per_step


def test_sizes_given_are_kept_or_refused(tmp_path):
    examples = made(60)
    assert chosen(examples, tmp_path, encoder_tokens=2048)[1].encoder_tokens == 2048
    for given in (1000, 128):
        with pytest.raises(ConfigurationError, match=str(given)):
            chosen(examples, tmp_path, encoder_tokens=given)
