"""Tensors that processes divide among them: the whole from its parts, and this process's part of a whole.

A divided matrix is a DTensor of FSDP2, `Shard(0)` in the last dimension of its mesh. The optimizer has a plain tensor
in its place, the rows of this process, whose attribute `rows_of` is that matrix. Any other tensor is its own whole.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fat5.train.world import together


def name_rows(matrix: Any) -> nn.Parameter:
    """This process's rows of a divided matrix, for the optimizer: the same memory as a plain tensor."""
    rows = nn.Parameter(local(matrix), requires_grad=matrix.requires_grad)
    rows.rows_of = matrix  # type: ignore[attr-defined]
    return rows


@torch.no_grad()
def whole(tensor: Tensor, rows: Tensor | None = None) -> Tensor:
    """The whole tensor from the parts of all processes, which all call this.

    Args:
        tensor: of a model's state dict; or, with `rows`, what the optimizer keeps for these rows.
    """
    matrix: Any = tensor if rows is None else getattr(rows, "rows_of", None)
    if not hasattr(matrix, "full_tensor") or not tensor.ndim:
        return tensor
    if rows is not None:
        from torch.distributed.tensor import DTensor

        mesh, places = matrix.device_mesh, matrix.placements
        matrix = DTensor.from_local(tensor, mesh, places, run_check=False, shape=matrix.shape, stride=matrix.stride())
    with together():
        return matrix.full_tensor()  # type: ignore[no-any-return]


def local(tensor: Any) -> Tensor:
    """The part of a tensor that is in this process, in the same memory."""
    return tensor.detach().to_local() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def own_part(tensor: Tensor, saved: Tensor) -> Tensor:
    """Of a whole tensor the rows that this process holds, in the same memory.

    Args:
        tensor: of a model's state dict, or a weight as the optimizer has it.
        saved: of the whole's number of rows; a single number is nobody's part.
    """
    matrix: Any = getattr(tensor, "rows_of", tensor)
    if not hasattr(matrix, "full_tensor") or not saved.ndim:
        return saved
    mesh = matrix.device_mesh
    each = -(-matrix.shape[0] // mesh.size(mesh.ndim - 1))
    return saved.narrow(0, each * mesh.get_local_rank(mesh.ndim - 1), local(matrix).shape[0])


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight as the optimizer has it, with the rows of all processes."""
    matrix: Tensor = getattr(weight, "rows_of", weight)
    return matrix.shape
