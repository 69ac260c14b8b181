"""One step for many batches: places of a fixed shape, so that a window's launches are recorded once and replayed."""

import logging

import torch
from torch import Tensor

from fat5.generate.step import DecoderWeights, Step

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
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.batches, self.records, self.failed = 0, memory.is_cuda, False

    def load(self, memory: Tensor, memory_mask: Tensor | None) -> None:
        """Begins a batch: memory (b, l, d) and its mask (b, l), b <= B, l at most the bucket."""
        assert self.memory_bias is not None
        items, length, _ = memory.shape
        for layer, keys, values in zip(self.weights.layers, self.memory_keys, self.memory_values):
            for places, project in ((keys, layer.memory_key), (values, layer.memory_value)):
                places.zero_()
                heads = self._memory_heads(project(memory)).unflatten(0, (items, self.heads))
                places.unflatten(0, (self.items, self.heads))[:items, :, :length].copy_(heads)
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
        if self.records and not self.failed:
            try:
                return self._replayed(window, position == 0 and self.batches <= CHECKED_BATCHES)[:rows].clone()
            except RuntimeError as error:
                self.failed = True
                self.graphs.clear()
                logger.warning("Decoding goes on without CUDA graphs: %s", str(error).strip()[:300])
        return self.run(self.tokens, self.position, window)[:rows]

    def _replayed(self, window: int, checked: bool) -> Tensor:
        plain = self.run(self.tokens, self.position, window) if checked else None
        if window not in self.graphs:
            self.graphs[window] = self._record(window)
        graph, logits = self.graphs[window]
        graph.replay()
        if plain is not None:
            limit = TOLERANCE * float(plain.abs().max().nan_to_num())
            if not torch.allclose(logits, plain, rtol=0.0, atol=limit, equal_nan=True):
                raise RuntimeError("the logits of a replayed step differ from those of the step")
        return logits

    def _record(self, window: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph and the place of its logits."""
        device = self.tokens.device
        enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        # A weight that autocast had cast before would be gone at the next batch, so a graph casts its own.
        with torch.cuda.device(device), torch.autocast(device.type, dtype, enabled, cache_enabled=False):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # Warm-up; it writes what the replay will write again.
                self.run(self.tokens, self.position, window)
            torch.cuda.current_stream().wait_stream(side)
            # Other threads may go on with theirs: one pins the next batch, one writes a checkpoint.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self.run(self.tokens, self.position, window)
        return graph, logits
