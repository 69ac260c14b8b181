"""An optimizer whose state lies in the host's memory, and visits the device a chunk of the weights at a time.

On a GPU three things run at once, each in a stream of its own: one chunk is updated, the state of the next arrives,
that of the one before leaves. Three buffers on the device take turns, and the host never waits.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Weights of a chunk; a larger matrix is a chunk of its own. AdamW's two float32 moments of it are 128 MiB."""

BUFFERS = 3
ALIGNMENT = 256
FLAGS = ("found_inf", "grad_scale")
"""What a training step sets on an optimizer that skips on the device."""


class OffloadedOptimizer(torch.optim.Optimizer):
    """Steps an optimizer chunk by chunk; every number is the one that the optimizer alone would compute.

    Args:
        optimizer: each weight's step depends on that weight, its gradient and its state only.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer
        self.defaults: dict[str, Any] = {}
        self.param_groups = optimizer.param_groups
        self._chunks = list(_divide([weight for group in self.param_groups for weight in group["params"]]))
        self._buffers: list[Tensor] = []
        self._users: list[_Chunk | None] = [None] * BUFFERS
        device = self._chunks[0].weights[0].device if self._chunks else torch.device("cpu")
        self._arriving, self._leaving = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))

    @property
    def skips_on_device(self) -> bool:
        """As the optimizer inside."""
        return bool(getattr(self.inner, "skips_on_device", False))

    @property
    def state(self) -> Any:  # type: ignore[override]
        """Weight → state, complete: what is on its way home is waited for."""
        self._wait()
        return self.inner.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name in FLAGS:
            if name in self.__dict__:
                setattr(self.inner, name, self.__dict__[name])
        for chunk in self._chunks:
            chunk.bring_home(self.inner.state)
        self._make_buffers()
        whole = [group["params"] for group in self.param_groups]
        try:
            self._fetch(0)
            for number, chunk in enumerate(self._chunks):
                self._fetch(number + 1)
                for group, weights in zip(self.param_groups, whole, strict=True):
                    group["params"] = [weight for weight in weights if id(weight) in chunk.ids]
                self._update(number)
        finally:
            for group, weights in zip(self.param_groups, whole, strict=True):
                group["params"] = weights
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        self._wait()
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups

    def _wait(self) -> None:
        for chunk in self._chunks:
            if chunk.stored is not None:
                chunk.stored.synchronize()

    def _make_buffers(self) -> None:
        most = max((chunk.size for chunk in self._chunks), default=0)
        if self._buffers and len(self._buffers[0]) >= most:
            return
        self._wait()
        device = self._chunks[0].weights[0].device if self._chunks else None
        self._buffers = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        if self._arriving is not None:  # the memory may have had another use, which is still under way
            self._arriving.wait_stream(torch.cuda.current_stream(device))

    def _fetch(self, number: int) -> None:
        """Sends a chunk's state to its buffer, once the buffer is free and the state complete."""
        if number >= len(self._chunks):
            return
        chunk, slot = self._chunks[number], number % BUFFERS
        before, self._users[slot] = self._users[slot], chunk
        with _on(self._arriving):
            for earlier in (chunk, before):
                if self._arriving is not None and earlier is not None and earlier.stored is not None:
                    self._arriving.wait_event(earlier.stored)
            self._buffers[slot][: chunk.size].copy_(chunk.host, non_blocking=True)
            chunk.fetched = _event(self._arriving)

    def _update(self, number: int) -> None:
        """Steps a chunk with its state in the buffer, and sends that home."""
        chunk, buffer = self._chunks[number], self._buffers[number % BUFFERS]
        if chunk.fetched is not None:
            torch.cuda.current_stream(buffer.device).wait_event(chunk.fetched)
        chunk.use(self.inner.state, buffer)
        try:
            self.inner.step()
        finally:
            chunk.use(self.inner.state, chunk.host)
        if self._leaving is not None:
            self._leaving.wait_stream(torch.cuda.current_stream(buffer.device))
        with _on(self._leaving):
            chunk.host.copy_(buffer[: chunk.size], non_blocking=True)
            chunk.stored = _event(self._leaving)
        chunk.bring_home(self.inner.state)  # what the first step has made


class _Chunk:
    """Some weights, and their state in one piece of the host's memory; single numbers stay where they are."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights, self.ids = weights, {id(weight) for weight in weights}
        self.pinned = bool(weights) and weights[0].is_cuda
        self.host = torch.empty(0, dtype=torch.uint8, pin_memory=self.pinned)
        self.size = 0
        """Bytes of `host`"""
        self._places: list[tuple[Tensor, str, int, torch.dtype, torch.Size]] = []
        self._home: dict[tuple[int, str], Tensor] = {}
        self.fetched: Any = None
        self.stored: Any = None

    def bring_home(self, state: Any) -> None:
        """Takes in state that lies elsewhere: a first step or a checkpoint has put it there. Waits for it."""
        found = [
            (weight, key, value)
            for weight in self.weights
            if weight in state
            for key, value in state[weight].items()
            if isinstance(value, Tensor) and value.ndim
        ]
        if all(self._home.get((id(weight), key)) is value for weight, key, value in found):
            return
        if self.stored is not None:
            self.stored.synchronize()
        self._places, self._home, self.size = [], {}, 0
        for weight, key, value in found:
            self._places.append((weight, key, self.size, value.dtype, value.shape))
            self.size += -(-value.numel() * value.element_size() // ALIGNMENT) * ALIGNMENT
        self.host = torch.empty(self.size, dtype=torch.uint8, pin_memory=self.pinned)
        values = [value for _, _, value in found]
        self.use(state, self.host)
        for (weight, key, *_), value in zip(self._places, values, strict=True):
            state[weight][key].copy_(value)

    def use(self, state: Any, buffer: Tensor) -> None:
        """Points the state of the weights into `buffer`, which is laid out as `host`."""
        for weight, key, start, dtype, shape in self._places:
            size = shape.numel() * dtype.itemsize
            view = buffer[start : start + size].view(dtype).view(shape)
            state[weight][key] = view
            if buffer is self.host:
                self._home[id(weight), key] = view


def _divide(weights: list[Tensor]) -> Iterator[_Chunk]:
    chunk: list[Tensor] = []
    numbers = 0
    for weight in weights:
        # By whole matrices, so that processes which hold different rows of them make the same chunks.
        size = getattr(weight, "rows_of", weight).numel()
        if chunk and numbers + size > CHUNK:
            yield _Chunk(chunk)
            chunk, numbers = [], 0
        chunk.append(weight)
        numbers += size
    if chunk:
        yield _Chunk(chunk)


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _event(stream: Any) -> Any:
    return None if stream is None else stream.record_event()
