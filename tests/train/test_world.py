"""What processes tell each other: nothing where there is one, and the same answer in both where there are two."""

import tempfile
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fat5.train.world import World

CPU = torch.device("cpu")


def test_alone_nothing_is_exchanged():
    world, tensor = World(CPU), torch.ones(3)
    assert world.is_main
    assert world.all_sum(tensor) is tensor
    assert world.all_any(tensor) is tensor
    assert (world.agree(None), world.agree(15)) == (None, 15)
    assert world.broadcast(tensor) is tensor


def of_two(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(seconds=60), 2, rank)
    world = World(CPU, rank, 2)
    assert world.is_main == (rank == 0)
    assert world.all_sum(torch.tensor([1, 10 * rank])).tolist() == [2, 10]
    assert world.all_any(torch.tensor([False, rank == 1])).tolist() == [False, True]
    assert world.agree(None) is None
    assert world.agree(15 if rank == 1 else None) == 15
    assert world.agree("é" * (1 + 5 * rank)) == "é"
    assert world.broadcast({"rank": rank, "loss": [1.5] * (1 + rank)}) == {"rank": 0, "loss": [1.5]}
    with pytest.raises(TypeError, match="not JSON serializable"):  # only a pickle could carry it
        world.broadcast({1, 2})
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="waits for a torch with torch.distributed")
def test_two_processes_agree():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(of_two, (f"{folder}/meeting",), nprocs=2)
