"""The order of training: an endless stream of pieces, a pure function of (seed, position).

Documents are cut into consecutive pieces of at most `max_tokens`. Every pass over a source has its own order, a keyed
permutation, so nothing is stored or shuffled. Sources alternate in a fixed periodic pattern, in proportion to their
weights. Position → piece takes O(log documents), and does not depend on earlier positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fat5.data.examples import kernels
from fat5.data.examples.denoisers import MixtureOfDenoisers, check_share, sentinel_array, split_seed
from fat5.data.shards.token_shards import TokenShards, open_shards
from fat5.errors import ConfigurationError, DataError, TokenizerError, check_whole

if TYPE_CHECKING:
    from fat5.data.tokenizer.loading import TokenizerInfo

BLEND_PERIOD = 1 << 14
MIN_MAX_TOKENS = 8


@dataclass(frozen=True)
class WeightedShards:
    """The token shards of one split, and the relative share of the *tokens* that they get in training."""

    shards: TokenShards
    weight: float = 1.0


def open_weighted(folders: Sequence[str], weights: Sequence[float], split: str) -> list[WeightedShards]:
    """One split of prepared folders; without weights their shares are equal.

    Raises:
        ConfigurationError: another number of weights than of folders. DataError: as `open_shards`.
    """
    if weights and len(weights) != len(folders):
        raise ConfigurationError(f"{len(weights)} weights for {len(folders)} folders", where="weights")
    shards = [open_shards(folder, split) for folder in folders]
    return [WeightedShards(*pair) for pair in zip(shards, weights or [1.0] * len(shards))]


class PieceStream:
    """Positions 0, 1, 2, … of the endless stream, each resolved to a piece, a denoiser and the lengths of its example.

    Attributes:
        num_pieces: pieces of each source.
        short_documents: documents below 2 tokens of each source; they cannot be corrupted, and are left out.
        short_tokens: tokens in them, at most one each.
        cut_documents: documents longer than `max_tokens` of each source.
        max_lengths: the longest encoder and decoder side that an example can have.
    """

    def __init__(
        self,
        sources: Sequence[WeightedShards | TokenShards],
        mixture: MixtureOfDenoisers,
        info: TokenizerInfo,
        max_tokens: int,
        seed: int,
    ) -> None:
        """
        Raises:
            ConfigurationError: a weight, seed or max_tokens that cannot work.
            DataError: a source holds nothing to train on, or a damaged shard.
            TokenizerError: the shards were made with another tokenizer, or it lacks sentinels or a mode token.
        """
        if not sources:
            raise ConfigurationError("no data source is given", where="data.sources")
        check_whole(max_tokens, "max_tokens", least=MIN_MAX_TOKENS)
        self.sources = [source if isinstance(source, WeightedShards) else WeightedShards(source) for source in sources]
        self.mixture, self.info, self.max_tokens, self.seed = mixture, info, max_tokens, seed
        for index, source in enumerate(self.sources):
            check_share(source.weight, f"data.sources[{index}].weight")
            if source.shards.manifest.tokenizer_sha256 != info.sha256:
                raise TokenizerError(
                    "the shards were made with another tokenizer",
                    where=source.shards.folder,
                    hint="Use the tokenizer/ folder beside them, or prepare the corpus again with yours",
                )
        self._build()

    def _build(self) -> None:
        self.num_pieces: list[int] = []
        self.short_documents: list[int] = []
        self.short_tokens: list[int] = []
        self.cut_documents: list[int] = []
        self._maps: list[np.ndarray] = []  # keeps the addresses alive
        self._owners: list[tuple[int, int]] = []
        blocks = []
        first_document: list[int] = []
        for number, source in enumerate(self.sources):
            shards = [source.shards.shard_ends(shard) for shard in range(len(source.shards.entries))]
            blocks.append(self._count_pieces(shards))
            if not self.num_pieces[-1]:
                raise DataError(
                    "no document of at least 2 tokens", where=f"{source.shards.folder} ({source.shards.split})"
                )
            first_document += [0, *np.cumsum([ends.size for ends in shards])[:-1].tolist()]
            self._owners += [(number, shard) for shard in range(len(shards))]
            self._maps += shards
        # Shares of draws, so that shares of *tokens* are in proportion to the weights.
        mean = np.array([source.shards.num_tokens / pieces for source, pieces in zip(self.sources, self.num_pieces)])
        draws = np.array([source.weight for source in self.sources]) / mean
        blend_source, blend_rank, blend_count = blend(draws / draws.sum())
        self.max_lengths = self.mixture.max_lengths(self.max_tokens, sentinel_array(self.info).size)
        self.tables = kernels.StreamTables(
            pieces=np.array(self.num_pieces, np.int64),
            simple=np.array([short == 0 and cut == 0 for short, cut in zip(self.short_documents, self.cut_documents)]),
            index_first=np.cumsum([0, *map(len, blocks)]),
            blocks=np.concatenate(blocks),
            shard_first=np.cumsum([0, *(len(source.shards.entries) for source in self.sources)]),
            first_document=np.array(first_document, np.int64),
            documents=np.array([ends.size for ends in self._maps], np.int64),
            ends_address=np.array([ends.ctypes.data for ends in self._maps], np.int64),
            tokens_address=np.zeros(len(self._maps), np.int64),
            token_bytes=np.array([self.sources[s].shards.dtype.itemsize for s, _ in self._owners], np.int64),
            blend_source=blend_source,
            blend_rank=blend_rank,
            blend_count=blend_count,
            **mixture_tables(self.mixture, self.info, self.max_tokens, self.seed),
        )

    def _count_pieces(self, shards: list[np.ndarray]) -> np.ndarray:
        """Counts the pieces of a source; returns how many are before each block of documents: int64."""
        blocks = []
        pieces = documents = short = short_tokens = cut = 0
        for ends in shards:
            lengths = np.diff(ends.astype(np.int64), prepend=0)
            counts = np.where(lengths < 2, 0, -(-lengths // self.max_tokens))
            before = pieces + np.cumsum(counts) - counts
            blocks.append(before[-documents % kernels.BLOCK_DOCUMENTS :: kernels.BLOCK_DOCUMENTS])
            pieces, documents = pieces + int(counts.sum()), documents + counts.size
            short += int((counts == 0).sum())
            short_tokens += int(lengths[counts == 0].sum())
            cut += int((counts > 1).sum())
        self.num_pieces.append(pieces)
        self.short_documents.append(short)
        self.short_tokens.append(short_tokens)
        self.cut_documents.append(cut)
        return np.concatenate([np.zeros(0, np.int64), *blocks])

    def notes(self) -> list[str]:
        """Warnings for the user: documents too short to corrupt, and spans limited by the sentinels."""
        notes = []
        for source, count in zip(self.sources, self.short_documents):
            if count:
                share = f"{count:,} of {source.shards.num_documents:,} documents"
                notes.append(f"{source.shards.folder}: {share} have fewer than 2 tokens and cannot be corrupted")
        return notes + self.mixture.notes(self.max_tokens, self.tables.sentinels.size)

    def lengths(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encoder and decoder tokens of the examples at stream positions: two int64 arrays."""
        examples = self.resolve(positions)
        return examples.encoder, examples.decoder

    def resolve(self, positions: np.ndarray) -> kernels.Examples:
        """The examples at stream positions (int64)."""
        examples = empty_examples(positions.size)
        kernels.resolve(self.tables, positions, examples)
        return examples

    def resolve_fixed(self, source: int, pieces: np.ndarray, denoiser: int) -> kernels.Examples:
        """Given pieces of one source under a given denoiser."""
        examples = empty_examples(pieces.size)
        kernels.resolve_fixed(self.tables, source, pieces, denoiser, examples)
        return examples

    def write(
        self, examples: kernels.Examples, domain: int = kernels.TRAINING, sizes: tuple[int, int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Corrupts examples, one after another; `sizes` are T encoder tokens, U decoder tokens, N examples to pad to.

        Returns:
            inputs (T,) and targets (U,), int64, padded with the pad id and -100.
            cu_seqlens (N+1,) of both, int32, padded with the end.
        """
        self._map(examples.shard)
        lengths, target_lengths, most = sizes or (examples.encoder.sum(), examples.decoder.sum(), examples.piece.size)
        inputs, targets = np.empty(lengths, np.int64), np.empty(target_lengths, np.int64)
        cu_inputs, cu_targets = np.empty((2, most + 1), np.int32)
        i, t = kernels.write_examples(self.tables, examples, domain, inputs, targets, cu_inputs, cu_targets)
        inputs[i:] = self.info.pad_id
        targets[t:] = -100
        return inputs, targets, cu_inputs, cu_targets

    def tokens(self, piece: int) -> np.ndarray:
        """Raw tokens of a global piece id: a view into its shard."""
        source, local = piece >> kernels.PIECE_BITS, piece & ((1 << kernels.PIECE_BITS) - 1)
        examples = self.resolve_fixed(source, np.array([local]), 0)
        self._map(examples.shard)
        owner, shard = self._owners[int(examples.shard[0])]
        start = int(examples.start[0])
        return self.sources[owner].shards.shard_tokens(shard)[start : start + int(examples.length[0])]

    def identity(self) -> dict[str, Any]:
        """What the order depends on, as JSON, part by part."""
        data = [
            [s.shards.manifest.tokenizer_sha256, [e.sha256 for e in s.shards.entries], s.weight] for s in self.sources
        ]
        return {"data": data, "seed": self.seed, "mixture": self.mixture.rows(), "max_tokens": self.max_tokens}

    def passes(self, cursor: int) -> list[float]:
        """Passes over each source, up to stream position `cursor`."""
        counts = self.tables.blend_count / self.tables.blend_source.size
        return [float(cursor * share / pieces) for share, pieces in zip(counts, self.num_pieces)]

    def _map(self, shards: np.ndarray) -> None:
        """Maps the shards about to be read; verifies them the first time."""
        for shard in np.unique(shards[self.tables.tokens_address[shards] == 0]):
            source, local = self._owners[shard]
            tokens = self.sources[source].shards.shard_tokens(local)
            self._maps.append(tokens)
            self.tables.tokens_address[shard] = tokens.ctypes.data

    def __getstate__(self) -> dict[str, object]:
        keys = ("sources", "mixture", "info", "max_tokens", "seed")
        return {key: self.__dict__[key] for key in keys}

    def __setstate__(self, state: dict[str, object]) -> None:
        """A spawned worker maps the files again, at other addresses."""
        self.__dict__.update(state)
        self._build()


def mixture_tables(mixture: MixtureOfDenoisers, info: TokenizerInfo, max_tokens: int, seed: int) -> dict[str, Any]:
    """The part of `StreamTables` that says how a piece is corrupted."""
    sentinels = sentinel_array(info)
    noise, spans = mixture.tables(max_tokens, sentinels.size)
    low, high = split_seed(seed)
    return {
        "thresholds": mixture.thresholds(),
        "noise": noise,
        "spans": spans,
        "anywhere": np.array([denoiser.anywhere for denoiser in mixture.denoisers]),
        "mode": np.array([denoiser.mode_id(info) for denoiser in mixture.denoisers], np.int64),
        "sentinels": sentinels,
        "eos": info.eos_id,
        "max_tokens": max_tokens,
        "seed_low": low,
        "seed_high": high,
    }


def blend(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One period of the interleaving: (source, earlier draws of that source in the period), and draws of each a period.

    Each source's draws, at least one a period, are spread evenly: the k-th of c at (k + 1/2) / c.
    """
    if shares.size == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)
    exact = shares * BLEND_PERIOD
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    while counts.sum() < BLEND_PERIOD:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > BLEND_PERIOD:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    source = np.repeat(np.arange(shares.size), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((rank + 0.5) / counts[source], kind="stable")
    return source[order], rank[order], counts


def empty_examples(count: int) -> kernels.Examples:
    """Room for `count` examples."""
    return kernels.Examples(*np.empty((len(kernels.Examples._fields), count), np.int64))
