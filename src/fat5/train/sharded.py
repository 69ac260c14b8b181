"""Weights that the processes divide among them (FSDP2): each holds some rows of every matrix, of its gradient and of
what the optimizer keeps for it. A block's matrices are gathered while it runs, forward and backward.

The other way to train on many devices; replicas.py has the plain one, with the same functions. Vectors, relative
position tables and matrices with fewer rows than processes stay whole in every process: they are small, norms lose
nothing to bfloat16, and a table is read outside its block. Their gradients are summed as those of replicas.

The optimizer sees plain tensors, the rows of this process (parts.py). What it computes by element is right as it is;
AdamWScale sums squares over the processes.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fat5.model.layers import Block
from fat5.optim import OptimizerConfig, build_optimizer
from fat5.train.parts import name_rows, whole
from fat5.train.precision import Precision
from fat5.train.replicas import Buckets, refuse_unequal, sums_of_bits
from fat5.train.world import World, together


class Shards:
    """A model whose matrices lie divided in the processes.

    Args:
        model: on the host; takes the weights and buffers of the main process, a block at a time.
        precision: under bf16 autocast the matrices of blocks are gathered in bfloat16; gradients are summed in float32.
        shards: processes that hold a matrix together, next to each other by rank; more processes hold copies.
    """

    # A micro-batch leaves what the next adds to in memory that only FSDP2 knows.
    records_steps: ClassVar[bool] = True

    def __init__(self, model: Any, world: World, precision: Precision, shards: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy
        from torch.distributed.tensor import DTensor

        self.model, self.world, self.shards = model, world, shards
        self._empty = _without_weights(model)
        sizes = {"copies": world.size // shards, "shards": shards}
        if sizes["copies"] == 1:
            del sizes["copies"]
        with together():
            self._mesh = init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        self._moved: set[Tensor] = set()
        kept_whole = {weight for name, weight in model.named_parameters() if not divides(name, weight, shards)}
        self._blocks = [module for module in model.modules() if isinstance(module, Block)]
        sums: dict[str, Any] = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
        # What autocast computes with, and half as much to gather. Embeddings and output projection stay float32: the
        # gradients of both are sums over many tokens, which bfloat16 would round.
        narrow = torch.bfloat16 if precision.name == "bf16" else None
        for block in self._blocks:
            self._divide(block, kept_whole, MixedPrecisionPolicy(param_dtype=narrow, **sums))
        self._divide(model, kept_whole, MixedPrecisionPolicy(**sums))
        model.set_requires_gradient_sync(False)
        self._named = [
            (name, name_rows(weight) if isinstance(weight, DTensor) else weight)
            for name, weight in model.named_parameters()
        ]
        self.weights = [weight for _, weight in self._named if weight.requires_grad]
        self._divided = [weight for weight in self.weights if hasattr(weight, "rows_of")]
        self._rest = Buckets([weight for weight in self.weights if not hasattr(weight, "rows_of")], world, False)

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user."""
        copies = self.world.size // self.shards
        held = f", in {copies} copies" if copies > 1 else ""
        return (f"shards  {self.shards} processes hold each matrix together{held}; a graph a block",)

    def compile(self, objective: Any, options: dict[str, Any]) -> Callable[..., Any]:
        """The module that a step runs, its blocks compiled: no graph can contain what FSDP2 does between them."""
        for block in self._blocks:
            block.forward = torch.compile(block.forward, **options)  # type: ignore[method-assign]
        return objective  # type: ignore[no-any-return]

    def build_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        """The optimizer of `config` over `weights`."""
        return build_optimizer(config, self)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that the optimizer changes, this process's rows of each, under their names in the model."""
        return iter(self._named)

    def before_step(self) -> None:
        """Gives back the embeddings that an evaluation gathered: a recorded step updates the weights without FSDP2's
        hooks, which would take the old ones for gathered.
        """
        self.model.reshard()

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Around the backward pass of a step's last micro-batch; then each gradient is the sum over all processes, of
        this process's rows.
        """
        self.model.set_requires_gradient_sync(True)
        with self._rest.summing():
            yield
        self.model.set_requires_gradient_sync(False)
        for rows in self._divided:
            matrix: Any = rows.rows_of  # type: ignore[attr-defined]
            rows.grad = None if matrix.grad is None else matrix.grad.to_local()
            matrix.grad = None

    def norm(self) -> Tensor:
        """The norm of the whole gradient, after `summing`: the same in every process."""
        rows, rest = (
            [weight.grad for weight in some if weight.grad is not None] for some in (self._divided, self._rest.weights)
        )
        squares = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if rows:
            squares += get_total_norm(rows).double().square()
        with together():
            dist.all_reduce(squares, group=self._group("shards"))
        if rest:
            squares += get_total_norm(rest).double().square()
        return squares.sqrt().float()

    @torch.no_grad()
    def gathered(self) -> Any:
        """The model with whole weights in the main process, for work of that process alone; called by all of them.

        It is a copy, on the main process's device. Another process gets one without weights.
        """
        empty = dict(self._empty.named_parameters(remove_duplicate=False))
        made: dict[int, Any] = {}
        buffers: dict[str, Tensor] = {}
        for name, weight in self.model.state_dict().items():
            place = empty.get(name)
            if place is None:
                buffers[name] = weight
            elif id(place) not in made:  # a tied weight once
                tensor = whole(weight)
                made[id(place)] = nn.Parameter(tensor.clone(), place.requires_grad) if self.world.is_main else place
        if not self.world.is_main:
            return self._empty
        model = copy.deepcopy(self._empty, made).to(self.world.device)
        for name, buffer in buffers.items():
            model.get_buffer(name).copy_(buffer)
        return model

    def check(self) -> None:
        """Compares weights that several processes hold, by a sum of their bits.

        Raises:
            FAT5Error: they differ; a checkpoint of them would be one of no run.
        """
        kept = [weight for _, weight in self._named if not hasattr(weight, "rows_of")]
        equal = not kept or self.world.are_equal(sums_of_bits(kept))
        if self._mesh.ndim > 1:
            rows = [weight for _, weight in self._named if hasattr(weight, "rows_of")]
            same = self.world.are_equal(sums_of_bits(rows), self._group("copies"))
            equal = not self.world.all_any(torch.tensor(not (equal and same)))
        refuse_unequal(equal)

    def _group(self, name: str) -> Any:
        """The processes that hold one matrix together (`shards`), or the same rows (`copies`)."""
        return self._mesh.get_group(name)

    def _divide(self, module: Any, kept_whole: set[nn.Parameter], precision: Any) -> None:
        """Moves a module to the device with the main process's weights, and keeps this process's rows."""
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        for tensor in [*module.parameters(), *module.buffers()]:
            if not isinstance(tensor, DTensor) and tensor not in self._moved:
                tensor.data = tensor.data.to(self.world.device)
                self.world.share(tensor.data)
                self._moved.add(tensor)
        how = {"mesh": self._mesh, "mp_policy": precision, "ignored_params": kept_whole}
        fully_shard(module, reshard_after_forward=None if module is self.model else True, **how)
        module.set_gradient_divide_factor(1.0)  # the loss is divided by the targets of all processes already
        module.set_force_sum_reduction_for_comms(True)


def divides(name: str, weight: Tensor, shards: int) -> bool:
    """Whether a weight is divided into `shards` parts: a matrix with rows for each of them, and no position table."""
    if weight.ndim < 2 or "relative_attention_bias" in name:
        return False
    rows, each = weight.shape[0], -(-weight.shape[0] // shards)
    return each * (shards - 1) < rows


def _without_weights(model: Any) -> Any:
    """A copy of a model whose parameters have shapes and no numbers."""
    empty: dict[int, Any] = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, empty)
