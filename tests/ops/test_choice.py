"""What a recorded graph is: an export or a trace, and not a function that torch.compile compiles."""

import pytest
import torch
from torch import Tensor, nn

from fat5.ops import is_recorded


class Asked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if is_recorded() else x


def test_a_compiled_function_is_not_recorded() -> None:
    x = torch.zeros(1)
    assert torch.compile(Asked(), backend="eager", fullgraph=True)(x).item() == 0


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_recorded(strict: bool) -> None:
    x = torch.zeros(1)
    assert torch.export.export(Asked(), (x,), strict=strict).module()(x).item() == 1
    assert not is_recorded()


def test_a_trace_is_recorded() -> None:
    x = torch.zeros(1)
    assert torch.jit.trace(Asked(), (x,), check_trace=False)(x).item() == 1
