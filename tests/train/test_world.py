"""What processes tell each other: nothing where there is one, and the same answer in both where there are two."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fat5.train.world import World
from made_ranks import forked, rank

CPU = torch.device("cpu")


def test_alone_nothing_is_exchanged():
    world, tensor = World(CPU), torch.ones(3)
    assert world.is_main
    assert world.all_sum(tensor) is tensor
    assert world.all_any(tensor) is tensor
    assert (world.agree(None), world.agree(15)) == (None, 15)
    assert world.broadcast(tensor) is tensor


def of_two() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    own = rank()
    world = World(CPU, own, 2)
    assert world.is_main == (own == 0)
    assert world.all_sum(torch.tensor([1, 10 * own])).tolist() == [2, 10]
    assert world.all_any(torch.tensor([False, own == 1])).tolist() == [False, True]
    assert world.agree(None) is None
    assert world.agree(15 if own == 1 else None) == 15
    assert world.agree("é" * (1 + 5 * own)) == "é"
    assert world.broadcast({"rank": own, "loss": [1.5] * (1 + own)}) == {"rank": 0, "loss": [1.5]}
    with pytest.raises(TypeError, match="not JSON serializable"):  # only a pickle could carry it
        world.broadcast({1, 2})
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="waits for a torch with torch.distributed")
def test_two_processes_agree():
    assert forked(of_two) == [0, 0]
