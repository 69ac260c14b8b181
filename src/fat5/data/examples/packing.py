"""Two-dimensional packing: examples of (encoder tokens, decoder tokens) into packs of two fixed budgets.

The planner holds a window of waiting examples. A pack starts with the oldest (so none waits forever), continues with
older ones that keep both sides even, and ends with the few that fill it best (`fit`). Only lengths are needed.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fat5.data.examples import fit
from fat5.data.examples.config import BatchConfig, Budget, rounded_up
from fat5.errors import ConfigurationError, DataError

DEFAULT_WINDOW = 1024
SLACK = 0.005
TINY = 1e-9  # stands for the mean of a side that is always empty
ENDLESS = 1 << 62  # stream positions are int64, and a window is drawn beyond the cursor
MEAN_SAMPLE = 4096  # examples whose mean lengths stand for the stream's


class Window:
    """Waiting examples, oldest first, by stream position and lengths."""

    def __init__(
        self, budget: Budget, source: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], end: int = ENDLESS
    ) -> None:
        """`source` maps stream positions to encoder and decoder lengths; `end` is their number."""
        self.budget = budget
        self._source = source
        self._end = end
        sample = source(np.arange(min(end, MEAN_SAMPLE), dtype=np.int64))
        self._overall = np.array([max(float(lengths.mean()), TINY) if lengths.size else 1.0 for lengths in sample])
        self._chosen = np.empty(budget.max_examples, np.int64)
        self.restore(0, np.empty(0, np.int64))

    def restore(self, cursor: int, waiting: Sequence[int] | np.ndarray) -> None:
        """Restores an earlier window: the next stream position, and the positions that wait."""
        self.cursor = cursor
        self.positions = np.array(waiting, dtype=np.int64)
        self.encoder, self.decoder = self._source(self.positions)

    def next_pack(self) -> np.ndarray:
        """Stream positions of the next pack, oldest first; none when all are packed."""
        self._refill()
        if not self.positions.size:
            return self.positions
        budget = self.budget
        used = np.zeros(2, np.int64)
        mean = np.maximum([self.encoder.mean(), self.decoder.mean()], TINY)
        held = 0
        packed: list[np.ndarray] = []
        while True:
            low = budget.window // 2 if self.cursor < self._end else -1
            limits = np.array([budget.encoder_tokens, budget.decoder_tokens, budget.max_examples, low, held])
            taken = np.zeros(self.positions.size, np.bool_)
            result = fit.fill_pack(self.encoder, self.decoder, taken, limits, used, mean, self._overall, self._chosen)
            total = result if result >= 0 else -1 - result
            packed.append(self.positions[self._chosen[held:total]])
            left = ~taken
            self.positions, self.encoder, self.decoder = self.positions[left], self.encoder[left], self.decoder[left]
            held = total
            if result >= 0:
                return np.concatenate(packed)
            self._refill()

    def _refill(self) -> None:
        """Draws until the window is full or the stream ends."""
        wanted = min(self.budget.window - self.positions.size, self._end - self.cursor)
        if wanted <= 0:
            return
        fresh = np.arange(self.cursor, self.cursor + wanted, dtype=np.int64)
        self.cursor += wanted
        encoder, decoder = self._source(fresh)
        self.positions = np.concatenate([self.positions, fresh])
        self.encoder = np.concatenate([self.encoder, encoder])
        self.decoder = np.concatenate([self.decoder, decoder])


def pack(
    encoder_lengths: Sequence[int] | np.ndarray,
    decoder_lengths: Sequence[int] | np.ndarray,
    encoder_tokens: int,
    decoder_tokens: int,
    window: int = DEFAULT_WINDOW,
    max_examples: int | None = None,
) -> list[list[int]]:
    """Packs examples into two budgets; every index appears in exactly one pack.

    Args:
        encoder_lengths, decoder_lengths: (N,) lengths of each example's two sides.
        encoder_tokens, decoder_tokens: most tokens of a pack on each side.
        window: examples to choose from.
        max_examples: most examples a pack may hold; None for no limit.

    Returns:
        Lists of indices, one per pack.

    Raises:
        DataError: an example is longer than a budget, or the lengths are not lengths.
        ConfigurationError: a budget or the window below 1.
    """
    encoder, decoder = np.asarray(encoder_lengths, np.int64), np.asarray(decoder_lengths, np.int64)
    most = max(encoder.size, 1) if max_examples is None else max_examples
    budget = Budget(encoder_tokens, decoder_tokens, most, window)
    for name, value in budget._asdict().items():
        if value < 1:
            raise ConfigurationError(f"must be above 0, not {value}", where=name)
    if encoder.ndim != 1 or encoder.shape != decoder.shape:
        raise DataError(f"encoder_lengths and decoder_lengths differ in shape: {encoder.shape}, {decoder.shape}")
    if (encoder < 0).any() or (decoder < 0).any():
        raise DataError("a length is negative")
    for side, lengths, limit in (("encoder", encoder, encoder_tokens), ("decoder", decoder, decoder_tokens)):
        if (lengths > limit).any():
            index = int(np.argmax(lengths > limit))
            raise DataError(
                f"example {index} has {lengths[index]:,} {side} tokens, a pack holds {limit:,}",
                hint=f"Raise {side}_tokens, or cut documents shorter with max_tokens",
            )
    waiting = Window(budget, lambda positions: (encoder[positions], decoder[positions]), end=encoder.size)
    packs = []
    while (positions := waiting.next_pack()).size:
        packs.append(positions.tolist())
    return packs


def packs_of_rank(
    encoder: np.ndarray, decoder: np.ndarray, config: BatchConfig, rank: int, world_size: int
) -> list[np.ndarray]:
    """Indices of the examples in each micro-batch of one rank, int64, where every example is packed once.

    Sharded models run in step, so every rank gets as many micro-batches as the others; the last may be empty.
    """
    width = config.packs_per_micro_batch
    budgets = width * config.encoder_tokens, width * config.decoder_tokens
    packs = pack(encoder, decoder, *budgets, max_examples=width * config.examples_per_pack)
    packs += [[]] * (-len(packs) % world_size)
    return [np.array(members, np.int64) for members in packs[rank::world_size]]


def fill(packs: Sequence[Sequence[int]], lengths: np.ndarray, budget: int) -> float:
    """Share of a side's budget that the packs use."""
    return float(sum(int(lengths[list(pack)].sum()) for pack in packs) / (budget * len(packs))) if packs else 0.0


def suggest_budgets(mean_encoder: float, mean_decoder: float, encoder_tokens: int) -> tuple[int, int]:
    """Budgets in the ratio of the mean lengths, rounded up to multiples of 128.

    The decoder gets half a percent more: of two sides equally tight, chance would leave both unfilled.
    """
    encoder = rounded_up(encoder_tokens)
    return encoder, rounded_up(encoder * mean_decoder / mean_encoder * (1 + SLACK))
