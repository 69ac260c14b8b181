"""Forward and backward replayed as one CUDA graph.

A step of a small model launches thousands of kernels, each from Python: the GPU then waits for the host. Shapes never
change from step to step, so the launches are recorded once and replayed at once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fat5.data import PackedBatch

Backward = Callable[[Sequence[PackedBatch], Tensor], list[Tensor]]
WARM_UPS = 2


class GraphedBackward:
    """Runs `backward` on batches of one shape from two recordings: one that sets the gradients, one that adds to them.

    Args:
        backward: forward and backward of batches on the device, always as many, and the count of their step's targets;
            returns their losses.
        weights: whose gradients it leaves. They live in the recording's memory: `zero_grad(set_to_none=True)` is enough
            between steps, and their addresses never change.
        device: a CUDA device.
    """

    def __init__(self, backward: Backward, weights: Sequence[Tensor], device: torch.device) -> None:
        self._backward, self._weights, self._device = backward, weights, device
        self._batches: list[PackedBatch] = []
        self._count = torch.zeros((), device=device)
        self._recordings: dict[bool, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self._gradients: list[Tensor | None] = []

    def __call__(self, batches: Sequence[PackedBatch], count: Tensor) -> list[Tensor]:
        """Losses of the batches; gradients are set if no weight has one, and added to otherwise."""
        adds = any(weight.grad is not None for weight in self._weights)
        if not self._batches:
            self._batches = [batch.to(self._device) for batch in batches]
        else:
            for own, batch in zip(self._batches, batches, strict=True):
                own.copy_(batch)
        self._count.copy_(count)
        if adds not in self._recordings:
            self._record(adds)
        graph, losses = self._recordings[adds]
        graph.replay()
        if not adds:
            for weight, gradient in zip(self._weights, self._gradients, strict=True):
                weight.grad = gradient
        return [loss.clone() for loss in losses]

    def _record(self, adds: bool) -> None:
        if not adds:
            self._warm_up()
        pool = self._recordings[not adds][0].pool() if self._recordings else None
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with theirs: one pins the next batch, one writes a checkpoint.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            losses = self._backward(self._batches, self._count)
        self._recordings[adds] = graph, losses
        if not adds:
            self._gradients = [weight.grad for weight in self._weights]

    def _warm_up(self) -> None:
        """Compiles, fills caches and chooses algorithms, none of which a recording may do; leaves no trace."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.random.fork_rng([self._device]), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._backward(self._batches, self._count)
                for weight in self._weights:
                    weight.grad = None
        torch.cuda.current_stream(self._device).wait_stream(stream)
