"""What the Triton backend allocates, counted: the formula of docs/attention.md, at lengths that nobody interprets."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.triton import backend
from fat5.ops.attention.triton.host import BAND_PROGRAMS
from fat5.ops.triton.launch import assumed_architecture, recording

HEADS, HEAD_DIM, REACH = 12, 64, 91


class Allocations(TorchDispatchMode):
    """Every storage made inside, kept alive so that no address is used twice: their sum is at least the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.storages.setdefault(storage.data_ptr(), storage)
        return found

    def bytes(self, given: list[torch.Tensor]) -> int:
        known = {x.untyped_storage().data_ptr() for x in given}
        return sum(storage.nbytes() for address, storage in self.storages.items() if address not in known)


def allocated(length: int) -> int:
    """Bytes of a forward and backward beyond q, k, v, the bias and the upstream gradient; no kernel runs."""
    q, k, v, grad_out = (torch.empty(length, HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(4))
    vector, starts = torch.zeros(HEADS, 2 * REACH + 1), torch.tensor([0, length], dtype=torch.int32)
    given = [q, k, v, grad_out, vector, starts]
    call = AttentionCall(q.requires_grad_(), k, v, vector, None, None, None, starts, starts, False, 1.0, 0.0)
    with assumed_architecture(90), recording(), Allocations() as allocations:
        plan = backend.plan(call)
        out, lse = backend.forward(call, plan)
        backend.backward(call, plan, grad_out, out, lse, True)
    return allocations.bytes(given)


@pytest.mark.parametrize("length", [8192, 65536])
def test_memory_is_the_formula(length: int) -> None:
    # out, dq, dk and dv in bfloat16; log-sum-exp, exponent and delta in float32.
    formula = length * HEADS * (4 * HEAD_DIM * 2 + 3 * 4)
    # The band kernel's partial sums, however long: a program leaves a few tiles of 64 x 32.
    most = BAND_PROGRAMS * 8 * 64 * 32 * 4
    assert formula <= allocated(length) <= formula + most + length * HEADS
    assert allocated(length) < 0.2 * HEADS * length**2 * 2, "a matrix of the bias alone"
