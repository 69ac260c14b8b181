"""The validation batches: in every run the same pieces with the same noise, each under every denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fat5.data.examples import kernels
from fat5.data.examples.batch import PackedBatch, write_packed
from fat5.data.examples.config import BatchConfig
from fat5.data.examples.denoisers import MixtureOfDenoisers
from fat5.data.examples.loader import check_rank
from fat5.data.examples.order import PieceStream, WeightedShards
from fat5.data.examples.packing import packs_of_rank
from fat5.errors import check_whole

if TYPE_CHECKING:
    from fat5.data.shards.token_shards import TokenShards
    from fat5.data.tokenizer.loading import TokenizerInfo

VALIDATION_SEED = 0  # not the run's, so that runs with different seeds can be compared


def validation_batches(
    sources: Sequence[WeightedShards | TokenShards],
    mixture: MixtureOfDenoisers,
    info: TokenizerInfo,
    config: BatchConfig,
    *,
    eval_tokens: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[PackedBatch]:
    """The validation batches of one rank: pieces of about `eval_tokens` raw tokens, each under every denoiser.

    Tokens are divided among the sources, shards of the validation split, by weight; a smaller split is taken whole.

    Raises:
        ConfigurationError, DataError, TokenizerError: as `PieceStream` and `PackedLoader`.
    """
    check_whole(eval_tokens, "eval_tokens", most=1 << 40)
    check_rank(rank, world_size)
    stream = PieceStream(sources, mixture, info, config.max_tokens, VALIDATION_SEED)
    config.check_longest(*stream.max_lengths)
    parts = []
    weights = np.array([source.weight for source in stream.sources])
    for source, share in enumerate(weights / weights.sum()):
        pieces = _choose(stream, source, int(np.ceil(eval_tokens * share)))
        parts += [stream.resolve_fixed(source, pieces, denoiser) for denoiser in range(len(mixture))]
    examples = kernels.Examples(*(np.concatenate(column) for column in zip(*parts)))
    # Round-robin over denoisers, so that each pack holds some of all.
    order = np.argsort(np.concatenate([np.arange(part.piece.size) for part in parts]), kind="stable")
    batches = packs_of_rank(examples.encoder[order], examples.decoder[order], config, rank, world_size)
    chosen = [examples.take(order[members]) for members in batches]
    return [write_packed(stream, config, members, kernels.VALIDATION) for members in chosen]


def _choose(stream: PieceStream, source: int, tokens: int) -> np.ndarray:
    """Pieces of one source in a fixed random order, until they hold `tokens`."""
    size = stream.num_pieces[source]
    words = kernels.philox(0, source, 0, kernels.VALIDATION << kernels.DOMAIN_SHIFT, 0, 0)
    chosen: list[np.ndarray] = []
    missing = tokens
    for start in range(0, size, 1024):
        turns = range(start, min(start + 1024, size))
        pieces = np.array([kernels.permute(turn, size, *words) for turn in turns], np.int64)
        reached = np.cumsum(stream.resolve_fixed(source, pieces, 0).length)
        count = min(int(np.searchsorted(reached, missing)) + 1, pieces.size)
        chosen.append(pieces[:count])
        missing -= int(reached[count - 1])
        if missing <= 0:
            break
    return np.concatenate(chosen)
