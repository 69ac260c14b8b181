"""One step for many batches: places of a fixed shape, so that a window's launches are recorded once and replayed."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fat5.generate.fused import Greedy
from fat5.generate.step import DecoderWeights, Step
from fat5.ops.cuda_graph import record

logger = logging.getLogger(__name__)

# Recording costs a few plain steps a window and shape: nothing beside the steps of several batches.
FEWEST_BATCHES = 2
# Widths of the memory: powers of two from the first to the second, then multiples of the second.
NARROWEST, WIDEST_POWER = 128, 1024
# Batches whose first replay is compared with the plain step: the one that recorded it and the one that came next.
CHECKED_BATCHES = 2
# Of the largest logit. A replay runs the kernels of the plain step, so a stale address differs by far more.
TOLERANCE = 0.02


def pays(device: torch.device, batches: int) -> bool:
    """Whether recording the steps of this many batches saves time."""
    return device.type == "cuda" and batches >= FEWEST_BATCHES


def bucket(length: int) -> int:
    """The width that a memory of this length is padded to."""
    if length > WIDEST_POWER:
        return -(-length // WIDEST_POWER) * WIDEST_POWER
    return max(NARROWEST, 1 << (length - 1).bit_length())


class SharedStep(Step):
    """A `Step` for one batch after another; on CUDA its launches are recorded once a window and replayed.

    A batch may be smaller. The rows that it lacks have one place of zeros for a memory; their logits are cut off. If
    recording fails, or a replay differs from the plain step, a warning says so and the plain step goes on.

    Args:
        memory: (B, Lm, d), the largest batch; B rows and the bucket of Lm are its shape.
        capacity, beams: as for `Step`.

    Attributes:
        records: whether it records and replays; else each step runs.
        failed: whether a recording failed.
    """

    def __init__(self, weights: DecoderWeights, memory: Tensor, capacity: int, beams: int) -> None:
        rows, length, size = memory.shape
        nothing = memory.new_zeros(rows, bucket(length), size)
        super().__init__(weights, nothing, torch.zeros(nothing.shape[:2], device=memory.device), capacity, beams)
        assert self.memory_bias is not None
        self.hidden = self.memory_bias.clone()
        self.tokens = torch.zeros(rows * beams, dtype=torch.long, device=memory.device)
        self.position = torch.zeros(1, dtype=torch.long, device=memory.device)
        self.graphs: dict[Any, tuple[Any, Tensor]] = {}
        self.greedily: dict[tuple[int, int], Greedy] = {}
        self.batches, self.records, self.failed = 0, memory.is_cuda, False

    def load(self, memory: Tensor, memory_mask: Tensor | None) -> None:
        """Begins a batch: memory (b, l, d) and its mask (b, l), b <= B, l at most the bucket."""
        assert self.memory_bias is not None
        items, length, _ = memory.shape
        self.memory.zero_()
        self.memory[:, :items, :, :length].copy_(self.weights.remember(memory))
        if self.memory_hidden is not None:
            mask = memory.new_ones(items, length) if memory_mask is None else memory_mask
            self._hide(mask)
            # The rows that the batch lacks read one place of zeros.
            self.memory_ends[items:] = 1
        self.memory_bias.copy_(self.hidden)
        bias = self.memory_bias.view(self.items, self.heads, -1)
        if memory_mask is None:
            bias[:items, :, :length] = 0
        else:
            bias[:items, :, :length].masked_fill_(memory_mask.bool()[:, None], 0)
        bias[items:, :, 0] = 0
        # What an earlier batch wrote is hidden, but hidden times NaN would still be NaN.
        for kept in (self.keys, self.values, self.tokens):
            kept.zero_()
        self.ancestors.copy_(self.slots[None, :, None].expand_as(self.ancestors))
        self.batches += 1

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        """The logits (b * n, V) float32 that follow `tokens` (b * n,) at `position`; keys and values are kept."""
        rows = len(tokens)
        self.tokens[:rows].copy_(tokens)
        self.position.fill_(position)
        window = self.window(position)
        run = partial(self.run, self.tokens, self.position, window)
        if self.records and not self.failed:
            try:
                if position == 0 and self.batches <= CHECKED_BATCHES:
                    return self._checked(window, run)[:rows].clone()
                return self._replayed(window, run)[:rows].clone()
            except RuntimeError as error:
                self._fail(error)
        return run()[:rows]

    def greedy(self, first: Tensor, stop: Tensor, pad: int) -> tuple[Greedy, Callable[[], object]]:
        """As `Step`'s, from one recording for all positions."""
        key = len(stop), pad
        greedy = self.greedily.setdefault(key, Greedy(self, *key))
        advance: Callable[[], object] = greedy.advance
        if self.records and not self.failed:
            try:
                # What is recorded, warmed up or checked runs, so the batch starts after it.
                greedy.start(first, stop)
                if self.batches <= CHECKED_BATCHES:
                    self._checked(key, greedy.advance, partial(greedy.start, first, stop))
                graph, _ = self._graph(key, greedy.advance)
                advance = graph.replay
            except RuntimeError as error:
                self._fail(error)
        greedy.start(first, stop)
        return greedy, advance

    def _fail(self, error: RuntimeError) -> None:
        self.failed = True
        self.graphs.clear()
        logger.warning("Decoding goes on without CUDA graphs: %s", str(error).strip()[:300])

    def _checked(self, key: Any, run: Callable[[], Tensor], again: Callable[[], None] = lambda: None) -> Tensor:
        """What a replay gives, compared with what `run` gives; `again` undoes a run."""
        plain = run().clone()
        again()
        self._graph(key, run)
        again()
        found = self._replayed(key, run)
        limit = TOLERANCE * float(plain.abs().max().nan_to_num())
        if not torch.allclose(found, plain, rtol=0.0, atol=limit, equal_nan=True):
            raise RuntimeError("the logits of a replayed step differ from those of the step")
        return found

    def _replayed(self, key: Any, run: Callable[[], Tensor]) -> Tensor:
        graph, logits = self._graph(key, run)
        graph.replay()
        return logits

    def _graph(self, key: Any, run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        """The graph of `run`, recorded once, and the place of what it returns."""
        if key not in self.graphs:
            graph, logits, _ = record(run, self.tokens.device)
            self.graphs[key] = graph, logits
        return self.graphs[key]
