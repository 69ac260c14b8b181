"""Weights that every process holds whole (data parallel): equal at the start, their gradients summed once a step.

The plain way to train on many devices. sharded.py divides the weights among the processes (FSDP2), with the same
functions; neither the step nor the trainer knows which of the two it has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fat5.errors import FAT5Error
from fat5.optim import OptimizerConfig, build_optimizer
from fat5.train.world import World, together

BUCKET_BYTES = 25 << 20
"""Gradients that travel at once: enough for the links' full speed, little enough to start early."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Bucket:
    """Gradients that are summed in one message."""

    weights: list[Tensor] = field(default_factory=list)
    size: int = 0
    """Bytes"""
    missing: set[int] = field(default_factory=set)
    """Weights whose gradient is still to come, by their ids"""
    flat: Tensor | None = None
    work: Any = None


class Buckets:
    """Sums the gradients of some weights over all processes, a bucket at a time. Alone, nothing happens.

    Args:
        weights: whose gradients are summed, in the model's order.
        overlap: send a bucket as soon as the backward pass has made its gradients. Not where the backward pass is
            recorded or its gradients come all at the end.
    """

    def __init__(self, weights: Sequence[Tensor], world: World, overlap: bool) -> None:
        self.weights, self.world = list(weights), world
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._next = 0
        self._armed = False
        for weight in self.weights if overlap and world.size > 1 else ():
            weight.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Around the backward pass of a step's last micro-batch; then each gradient is the sum over all processes."""
        if self.world.size == 1 or not self.weights:
            yield
            return
        for bucket in self._buckets:
            bucket.missing = {id(weight) for weight in bucket.weights}
        self._next, self._armed = 0, True
        try:
            yield
        finally:
            self._armed = False
        if not self._buckets:
            self._divide()
        with together():
            while self._next < len(self._buckets):
                self._send()
            for bucket in self._buckets:
                _receive(bucket)

    def _divide(self) -> None:
        """Buckets in the order in which the backward pass makes gradients, roughly; weights that get none are left out.

        All processes must send the same buckets, so a weight is in if any of them has its gradient.
        """
        used = self.world.all_any(torch.tensor([weight.grad is not None for weight in self.weights])).tolist()
        for weight, is_used in reversed(list(zip(self.weights, used, strict=True))):
            if not is_used:
                continue
            bucket = self._buckets[-1] if self._buckets else None
            if bucket is None or bucket.size >= BUCKET_BYTES or bucket.weights[0].dtype != weight.dtype:
                bucket = Bucket()
                self._buckets.append(bucket)
            bucket.weights.append(weight)
            bucket.size += weight.numel() * weight.element_size()
            self._bucket_of[id(weight)] = bucket

    def _arrived(self, weight: Tensor) -> None:
        """Called by the backward pass when a weight has its gradient. Buckets leave in order, as in every process."""
        bucket = self._bucket_of.get(id(weight))
        if not self._armed or bucket is None:
            return
        bucket.missing.discard(id(weight))
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        parts = [
            (torch.zeros_like(weight) if weight.grad is None else weight.grad).reshape(-1) for weight in bucket.weights
        ]
        bucket.flat = torch.cat(parts)
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        self._next += 1


class Replicas(Buckets):
    """The same model in every process.

    Args:
        model: moved to the world's device; takes the weights and buffers of the main process.
        overlap: as of `Buckets`.
    """

    records_steps: ClassVar[bool] = False
    """Whether a CUDA graph holds all micro-batches of a step and the sum over the processes, or one micro-batch"""
    notes: ClassVar[tuple[str, ...]] = ()
    """Lines for the user"""

    def __init__(self, model: nn.Module, world: World, overlap: bool) -> None:
        self.model = model.to(world.device)
        super().__init__([weight for weight in model.parameters() if weight.requires_grad], world, overlap)
        for tensor in model.state_dict().values() if world.size > 1 else ():
            world.share(tensor)

    def compile(self, objective: Any, options: dict[str, Any]) -> Callable[..., Any]:
        """The compiled form of the module that a step runs: one graph."""
        return torch.compile(objective, **options)

    def build_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        """The optimizer of `config` over `weights`."""
        return build_optimizer(config, self.model)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that the optimizer changes, under their names in the model."""
        return self.model.named_parameters()

    def before_step(self) -> None:
        """Nothing has to be undone."""

    def norm(self) -> Tensor:
        """The norm of the whole gradient, after `summing`."""
        return get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])

    def gathered(self) -> Any:
        """The model with whole weights in the main process, for work of that process alone; called by all of them."""
        return self.model

    def check(self) -> None:
        """Compares the weights of all processes by a sum of their bits.

        Raises:
            FAT5Error: they differ; a checkpoint of them would be one of no run.
        """
        if self.world.size > 1:
            tensors = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
            refuse_unequal(self.world.are_equal(sums_of_bits(tensors)))


def sums_of_bits(tensors: Sequence[Tensor]) -> Tensor:
    """For each tensor the sum of its elements, taken as integers: int64."""
    return torch.stack(
        [
            tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
            for tensor in tensors
        ]
    )


def refuse_unequal(are_equal: bool) -> None:
    """Raises FAT5Error unless the weights of the processes are equal."""
    if not are_equal:
        raise FAT5Error(
            "the weights of the processes are no longer equal",
            hint="A device computes wrongly, or the nodes run different versions; the last checkpoint is good",
        )


def _receive(bucket: Bucket) -> None:
    """Waits for a bucket, and puts its sums in place of the gradients."""
    assert bucket.flat is not None
    bucket.work.wait()
    parts = bucket.flat.split([weight.numel() for weight in bucket.weights])
    for weight, part in zip(bucket.weights, parts, strict=True):
        if weight.grad is None:
            weight.grad = torch.empty_like(weight)
        weight.grad.copy_(part.view_as(weight))
    bucket.flat = bucket.work = None
