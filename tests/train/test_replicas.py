"""Sums of gradients in buckets: the same as one sum over all, early or late, and weights that get none."""

import pytest
import torch
from torch import nn

from fat5.train import World, replicas
from fat5.train.replicas import Replicas
from made_ranks import forked, rank

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="waits for torch.distributed")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.unused = nn.Linear(3, 3)
        self.sometimes = nn.Linear(8, 8)

    def forward(self, x, sometimes):
        for layer in self.layers:
            x = layer(x).tanh()
        return (x + self.sometimes(x) if sometimes else x).square().sum()


@pytest.mark.parametrize("overlap", [True, False])
def test_sums_of_two_steps_with_two_micro_batches(overlap, monkeypatch):
    monkeypatch.setattr(replicas, "BUCKET_BYTES", 300)  # one matrix and its bias
    inputs = torch.randn(2, 2, 2, 4, 8, generator=torch.Generator().manual_seed(0))  # rank, step, micro-batch

    def work():
        with World.here() as world:
            torch.manual_seed(world.rank)  # the main process's weights count
            net = Net()
            group = Replicas(net, world, overlap)
            torch.manual_seed(0)
            alone = Net()
            for name, weight in alone.named_parameters():
                assert torch.equal(net.get_parameter(name), weight)
            for step in range(2):
                net(inputs[rank(), step, 0], True).backward()
                sent = []
                with group.summing():
                    # The other layer gets its gradient on one rank only, in the second step by the first micro-batch.
                    net(inputs[rank(), step, 1], rank() == 1).backward()
                    sent.append(group._next)
                # Buckets leave in order from the second step on; on rank 0 the first one lacks a weight.
                assert bool(sent[0]) == (overlap and step > 0 and rank() == 1)
                for own in range(2):
                    alone(inputs[own, step, 0], True).backward()
                    alone(inputs[own, step, 1], own == 1).backward()
                for name, weight in alone.named_parameters():
                    gradient = net.get_parameter(name).grad
                    assert (gradient is None) == (weight.grad is None) == name.startswith("unused")
                    if weight.grad is not None:
                        torch.testing.assert_close(gradient, weight.grad)
                net.zero_grad()
                alone.zero_grad()
            group.check()
            assert len(group._buckets) > 3

    assert forked(work) == [0, 0]


def test_alone_nothing_is_sent():
    net = Net()
    group = Replicas(net, World(torch.device("cpu")), overlap=True)
    with group.summing():
        net(torch.ones(1, 8), False).backward()
    assert net.sometimes.weight.grad is None
    group.check()
