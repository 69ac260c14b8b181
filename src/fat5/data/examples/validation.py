"""The validation batches: in every run the same pieces with the same noise, each under every denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fat5.data.examples import kernels
from fat5.data.examples.batch import BatchWriter, PackedBatch
from fat5.data.examples.config import BatchConfig
from fat5.data.examples.denoisers import MixtureOfDenoisers
from fat5.data.examples.order import PieceStream, WeightedShards
from fat5.data.examples.packing import pack
from fat5.data.examples.steps import check_rank
from fat5.errors import check_whole

if TYPE_CHECKING:
    from fat5.data.shards.token_shards import TokenShards
    from fat5.data.tokenizer.loading import TokenizerInfo

VALIDATION_SEED = 0  # not the run's, so that runs with different seeds can be compared


class ValidationBatches:
    """A bounded sequence of `PackedBatch`; iterating it again gives the same batches again.

    Attributes:
        num_pieces: validation pieces; each occurs once under every denoiser.
        num_tokens: raw tokens of those pieces.
    """

    def __init__(self, stream: PieceStream, config: BatchConfig, eval_tokens: int, rank: int, world_size: int) -> None:
        self._stream = stream
        self._writer = BatchWriter(stream, config)
        examples = []
        self.num_pieces = self.num_tokens = 0
        weights = np.array([source.weight for source in stream.sources])
        for source, share in enumerate(weights / weights.sum()):
            pieces, tokens = _choose(stream, source, int(np.ceil(eval_tokens * share)))
            self.num_pieces += pieces.size
            self.num_tokens += tokens
            examples += [stream.resolve_fixed(source, pieces, denoiser) for denoiser in range(len(stream.mixture))]
        self._examples = kernels.Examples(*(np.concatenate(column) for column in zip(*examples)))
        # Round-robin over denoisers, so that each pack holds some of all.
        order = np.argsort(np.concatenate([np.arange(part.piece.size) for part in examples]), kind="stable")
        packs = pack(
            self._examples.encoder[order],
            self._examples.decoder[order],
            config.packs_per_micro_batch * config.encoder_tokens,
            config.packs_per_micro_batch * config.decoder_tokens,
            max_examples=config.packs_per_micro_batch * config.examples_per_pack,
        )
        # Sharded models run in step, so every rank gets as many batches as the others; the last may be empty.
        packs += [[]] * (-len(packs) % world_size)
        self._packs = [order[np.array(members, np.int64)] for members in packs[rank::world_size]]

    def __len__(self) -> int:
        return len(self._packs)

    def __iter__(self) -> Iterator[PackedBatch]:
        for members in self._packs:
            chosen = kernels.Examples(*(np.ascontiguousarray(column[members]) for column in self._examples))
            yield self._writer.write(chosen, kernels.VALIDATION)


def validation_batches(
    sources: Sequence[WeightedShards | TokenShards],
    mixture: MixtureOfDenoisers,
    tokenizer_info: TokenizerInfo,
    batch_config: BatchConfig,
    *,
    eval_tokens: int,
    rank: int = 0,
    world_size: int = 1,
) -> ValidationBatches:
    """The validation batches of one rank: pieces of about `eval_tokens` raw tokens, each under every denoiser.

    Args:
        sources: shards of the validation split; `eval_tokens` is divided among them by weight.
        eval_tokens: raw tokens to choose; a smaller split is taken whole.

    Raises:
        ConfigurationError, DataError, TokenizerError: as `PackedLoader`.
    """
    check_whole(eval_tokens, "eval_tokens", most=1 << 40)
    check_rank(rank, world_size)
    stream = PieceStream(sources, mixture, tokenizer_info, batch_config.max_tokens, VALIDATION_SEED)
    return ValidationBatches(stream, batch_config, eval_tokens, rank, world_size)


def _choose(stream: PieceStream, source: int, tokens: int) -> tuple[np.ndarray, int]:
    """Pieces of one source in a fixed random order, until they hold `tokens`; and how many tokens they hold."""
    size = stream.num_pieces[source]
    words = kernels.philox(0, source, 0, kernels.VALIDATION << kernels.DOMAIN_SHIFT, 0, 0)
    chosen: list[np.ndarray] = []
    total = 0
    for start in range(0, size, 1024):
        turns = range(start, min(start + 1024, size))
        pieces = np.array([kernels.permute(turn, size, *words) for turn in turns], np.int64)
        reached = total + np.cumsum(stream.resolve_fixed(source, pieces, 0).length)
        count = min(int(np.searchsorted(reached, tokens)) + 1, pieces.size)
        chosen.append(pieces[:count])
        total = int(reached[count - 1])
        if total >= tokens:
            break
    return np.concatenate(chosen), total
