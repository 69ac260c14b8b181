"""CUDA graphs of an accelerated encoder, one for each shape, for short inputs, whose kernels end before the host has
launched the next.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fat5.errors import UnsupportedModelError
from fat5.model.layers import has_active_hooks
from fat5.model.padding import Padding
from fat5.ops.cuda_graph import record

logger = logging.getLogger(__name__)

MOST = 16
"""Shapes that are recorded; the next ones run as without recordings."""
DEVICE = "cuda"
KNOWN = ("torch.nn", "transformers", "fat5")
"""Whose modules a recording may hold: adapters (PEFT) can be switched without a trace."""
TOLERANCE = 0.02
"""Of the largest entry, between the first replay and the run: a stale address differs by far more."""


def check_device() -> None:
    """Raises UnsupportedModelError where PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        raise UnsupportedModelError(
            "cuda_graphs is true, and PyTorch sees no GPU", where="fat5.accelerate", hint="Leave cuda_graphs out"
        )


def room(tokens: int) -> int:
    """The length that packed tokens are recorded at: at most an eighth more, and 64."""
    step = max(64, 1 << max(tokens.bit_length() - 4, 0))
    return -(-tokens // step) * step


class Recordings:
    """The recorded runs of one encoder. A shape is recorded when it comes for the second time.

    Weights may change in place. What moves or replaces them, a hook, or a module in training makes recordings invalid,
    and is seen at the next call. A copy begins empty.
    """

    def __init__(self) -> None:
        self._runs: dict[Any, _Run] = {}
        self._seen: set[Any] = set()
        self._state: list[Any] | None = None
        self._failed = False
        self._lock = Lock()
        self._done: torch.cuda.Event | None = None

    def __deepcopy__(self, _memo: Any) -> "Recordings":
        return Recordings()

    def __reduce__(self) -> Any:
        return Recordings, ()

    def __call__(
        self, stack: Any, tokens: Tensor, padding: Padding, run: Callable[[Tensor, Padding], Tensor]
    ) -> Tensor | None:
        """run(tokens, padding) by a replay, in memory of its own; None where `run` is to be called."""
        if self._failed or tokens.device.type != DEVICE or torch.is_grad_enabled() or not len(tokens):
            return None
        if DEVICE == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        state = _state(stack, tokens.device)
        if state is None:
            return None
        with self._turn(tokens.device):
            if state != self._state:
                self._state = state
                self._runs.clear()
                self._seen.clear()
            key = _key(tokens, padding)
            if key not in self._runs:
                if key not in self._seen or len(self._runs) == MOST:
                    if len(self._seen) < 64 * MOST:
                        self._seen.add(key)
                    return None
                try:
                    pool = next(iter(self._runs.values())).graph.pool() if self._runs else None
                    self._runs[key] = _Run(tokens, padding, run, pool)
                except RuntimeError as error:
                    self._failed = True
                    self._runs.clear()
                    logger.warning("The encoder goes on without CUDA graphs: %s", str(error).strip()[:300])
                    return None
            return self._runs[key](tokens, padding)

    @contextmanager
    def _turn(self, device: torch.device) -> Iterator[None]:
        """Runs share their memory: one at a time, of all threads and streams."""
        with self._lock:
            if DEVICE != "cuda":
                yield
                return
            with torch.cuda.device(device):
                if self._done is None:
                    self._done = torch.cuda.Event()
                torch.cuda.current_stream().wait_event(self._done)
                yield
                self._done.record()


class _Run:
    """One recording, with the places that it reads and writes."""

    def __init__(self, tokens: Tensor, padding: Padding, run: Callable[[Tensor, Padding], Tensor], pool: Any) -> None:
        segments = padding.segments
        with torch.inference_mode(False), torch.no_grad():
            length = len(tokens) if padding.index is None else room(len(tokens))
            self.tokens = tokens.new_zeros(length, *tokens.shape[1:])
            assert segments.cu_seqlens is not None
            self.starts = segments.cu_seqlens.clone()
            self.mask = None if segments.mask is None else segments.mask.clone()
            # The longest text of a later batch may have the whole row.
            bound = padding.shape[1]
            self._write(tokens, padding)

            def again() -> Tensor:
                own = replace(segments, cu_seqlens=self.starts, max_seqlen=bound, mask=self.mask, shared={})
                return run(self.tokens, replace(padding, segments=own, index=None))

            self.graph, self.out, want = record(again, tokens.device, pool)
            self.graph.replay()
            limit = TOLERANCE * float(want.abs().max().nan_to_num())
            if not torch.allclose(self.out, want, rtol=0.0, atol=limit, equal_nan=True):
                raise RuntimeError("the states of a replay differ from those of the run")

    def __call__(self, tokens: Tensor, padding: Padding) -> Tensor:
        self._write(tokens, padding)
        self.graph.replay()
        return self.out[: len(tokens)].clone()

    def _write(self, tokens: Tensor, padding: Padding) -> None:
        self.tokens[: len(tokens)].copy_(tokens)
        assert padding.segments.cu_seqlens is not None
        self.starts.copy_(padding.segments.cu_seqlens)
        if self.mask is not None:
            self.mask.copy_(padding.segments.mask)  # type: ignore[arg-type]


def _key(tokens: Tensor, padding: Padding) -> tuple[Any, ...]:
    kind = tokens.device.type
    length = len(tokens) if padding.index is None else room(len(tokens))
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return length, tokens.shape[1:], tokens.dtype, padding.shape, padding.segments.mask is None, cast


def _state(stack: nn.Module, device: torch.device) -> list[Any] | None:
    """Modules, and addresses of weights; None if a call does more than a replay would."""
    if torch_module._has_any_global_hook():
        return None
    found: list[Any] = []
    for module in stack.modules():
        kind, own = type(module), vars(module)
        if own["training"] or "forward" in own or not kind.__module__.startswith(KNOWN) or has_active_hooks(module):
            return None
        found.append(kind)
        for weight in (*own["_parameters"].values(), *own["_buffers"].values()):
            if weight is not None:
                if weight.device != device:
                    return None
                found += (weight.data_ptr(), weight.dtype)
    return found
