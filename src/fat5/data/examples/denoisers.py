"""UL2's mixture of denoisers: how each corrupts a document, and how often each is drawn.

Source: Tay et al., "UL2: Unifying Language Learning Paradigms" (2022); span corruption after Raffel et al., "Exploring
the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020), `random_spans_noise_mask`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fat5.data.examples import kernels
from fat5.data.examples.config import DenoiserConfig
from fat5.errors import LARGEST_SIZE, ConfigurationError, DataError, TokenizerError

if TYPE_CHECKING:
    from fat5.data.tokenizer.loading import TokenizerInfo

DEFAULT_SENTINELS = 256


@dataclass(frozen=True)
class Denoiser:
    """One way to mask part of a document.

    Attributes:
        mu: mean span length, at least 1. If `r` is 0, the prefix kept is round(L/mu) tokens, and mu is above 1.
        r: corruption rate in [0, 1). 0 is the sequential denoiser, which needs `max_spans` 1.
        max_spans: most spans of one document; None and "max_token_length" set no limit.
        prefix: mode token before the inputs ("[R]", "[S]", "[X]"), or None.
        anywhere: spans lie anywhere. By default the last one ends the document, as in T5's `random_spans_noise_mask`,
            and a model never sees the last sentinel with text behind it.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    mu: float
    r: float
    max_spans: int | str | None = None
    prefix: str | None = None
    anywhere: bool = False

    def __post_init__(self) -> None:
        where = f"denoiser (mu={self.mu!r}, r={self.r!r}, max_spans={self.max_spans!r}, prefix={self.prefix!r})"
        if not _is_number(self.mu) or not 1 <= self.mu <= LARGEST_SIZE:
            raise ConfigurationError(f"mu (mean span length) must be a number from 1 to {LARGEST_SIZE:,}", where=where)
        if not _is_number(self.r) or not 0 <= self.r < 1:
            raise ConfigurationError("r (corruption rate) must be a number in [0, 1)", where=where)
        count = isinstance(self.max_spans, int) and not isinstance(self.max_spans, bool) and self.max_spans > 0
        if not count and self.max_spans not in (None, "max_token_length"):
            raise ConfigurationError("max_spans must be max_token_length, null or a whole number above 0", where=where)
        if self.prefix is not None and (not isinstance(self.prefix, str) or not self.prefix):
            raise ConfigurationError("prefix must be a mode token such as [R], or null for none", where=where)
        if not isinstance(self.anywhere, bool) or (self.anywhere and self.r == 0):
            raise ConfigurationError("anywhere must be true or false, and false if r is 0.0", where=where)
        if self.r == 0 and (self.max_spans != 1 or self.mu <= 1):
            raise ConfigurationError(
                "r 0.0 is the sequential denoiser, which needs max_spans 1 and mu above 1",
                where=where,
                hint="Set max_spans: 1 and mu, or give r above 0",
            )

    @property
    def sequential(self) -> bool:
        """True for the denoiser that keeps a prefix of round(L/mu) tokens and predicts the rest."""
        return self.r == 0

    def spans(self, length: int, num_sentinels: int = DEFAULT_SENTINELS) -> tuple[int, int]:
        """(noise tokens, spans) for a document of `length` >= 2 tokens, rounded half to even on float64 products."""
        noise, spans = self.span_tables(np.array([length]), num_sentinels)
        return int(noise[0]), int(spans[0])

    def lengths(self, length: int, num_sentinels: int = DEFAULT_SENTINELS) -> tuple[int, int]:
        """(encoder tokens, decoder tokens) of an example of `length` tokens, specials included; DataError below 2."""
        if length < 2:
            raise DataError(f"a document of {length} tokens is too short to corrupt", hint="Give at least 2 tokens")
        noise, spans = self.spans(length, num_sentinels)
        return (self.prefix is not None) + length - noise + spans + 1, noise + spans + 1

    def wanted_spans(self, lengths: np.ndarray) -> np.ndarray:
        """Spans by the rule alone, without the limit of a tokenizer's sentinels."""
        return self.span_tables(lengths, np.iinfo(np.int32).max)[1]

    def span_tables(self, lengths: np.ndarray, num_sentinels: int) -> tuple[np.ndarray, np.ndarray]:
        """`spans` for many lengths: two int32 arrays."""
        lengths = np.maximum(lengths.astype(np.float64), 2)
        noise = lengths - np.rint(lengths / self.mu) if self.sequential else np.rint(lengths * self.r)
        noise = np.clip(noise, 1, lengths - 1)
        limit = self.max_spans if isinstance(self.max_spans, int) else np.inf
        spans = np.clip(np.rint(noise / self.mu), 1, np.minimum(np.minimum(lengths - noise, limit), num_sentinels))
        return noise.astype(np.int32), spans.astype(np.int32)

    def mode_id(self, info: TokenizerInfo) -> int:
        """Id of the mode token, or -1 for none; TokenizerError if the tokenizer lacks it."""
        if self.prefix is None:
            return -1
        if self.prefix not in info.mode_ids:
            known = ", ".join(info.mode_ids) or "none"
            raise TokenizerError(
                f"the tokenizer has no mode token {self.prefix!r} (it has {known})",
                hint="Prepare the data with `fat5 prepare`, which adds them, or set prefix: null",
            )
        return int(info.mode_ids[self.prefix])

    def __call__(
        self, tokens: Sequence[int] | np.ndarray, info: TokenizerInfo, *, seed: int = 0, epoch: int = 0, piece: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Corrupts one document of L >= 2 ids without EOS; the same (seed, epoch, piece) always gives the same spans.

        Returns:
            inputs, targets: int64 arrays of `lengths(L)` tokens.
        """
        document = np.ascontiguousarray(tokens, dtype=np.int64)
        sentinels = sentinel_array(info)
        encoder, decoder = self.lengths(document.size, sentinels.size)
        noise, spans = self.spans(document.size, sentinels.size)
        inputs, targets = np.empty(encoder, np.int64), np.empty(decoder, np.int64)
        scratch = np.empty((2, spans + 1), np.int64), np.zeros(document.size + 1, np.uint8)
        word = (kernels.TRAINING << kernels.DOMAIN_SHIFT) + epoch
        noise_key = piece & kernels.MASK32, piece >> 32, word, *split_seed(seed)
        mode, eos = self.mode_id(info), info.eos_id
        kernels.corrupt(
            document, noise, spans, self.anywhere, mode, sentinels, eos, scratch, noise_key, inputs, 0, targets, 0
        )
        return inputs, targets


@dataclass(frozen=True)
class MixtureOfDenoisers:
    """Denoisers, and the share of the examples that each gets. Proportions are relative, and are normalised.

    Raises:
        ConfigurationError: no denoiser, more than 127, or a proportion that is not a number above 0.
    """

    denoisers: Sequence[Denoiser]
    proportions: Sequence[float]

    def __post_init__(self) -> None:
        count = len(self.denoisers)
        if not 0 < count <= 127:
            raise ConfigurationError(f"a mixture holds 1 to 127 denoisers, not {count}", where="mixture")
        if count != len(self.proportions):
            raise ConfigurationError(f"{count} denoisers but {len(self.proportions)} proportions", where="mixture")
        for index, proportion in enumerate(self.proportions):
            check_share(proportion, f"mixture[{index}].proportion")
        total = math.fsum(self.proportions)
        object.__setattr__(self, "denoisers", tuple(self.denoisers))
        object.__setattr__(self, "proportions", tuple(float(proportion) / total for proportion in self.proportions))

    @classmethod
    def named(cls, name: str) -> MixtureOfDenoisers:
        """One of the mixtures known by name: fat5 (the default), fat5-anywhere, ul2, t5, prefix-lm."""
        if name not in MIXTURES:
            raise ConfigurationError(
                f"no mixture is named {name!r}",
                where="mixture",
                hint=f"Choose from {', '.join(MIXTURES)}, or write a list",
            )
        return cls.of(MIXTURES[name])

    @classmethod
    def of(cls, mixture: Mixture) -> MixtureOfDenoisers:
        """A mixture from a name, or from a list of {mu, r, max_spans, prefix, anywhere, proportion} or of `Denoiser`.

        A `Denoiser` in the list gets proportion 1.
        """
        if isinstance(mixture, MixtureOfDenoisers):
            return mixture
        if isinstance(mixture, str):
            return cls.named(mixture)
        if not isinstance(mixture, Sequence):
            raise ConfigurationError(f"a mixture is a name or a list of denoisers, not {mixture!r}", where="mixture")
        denoisers, proportions = [], []
        for index, row in enumerate(mixture):
            where = f"mixture[{index}]"
            row = vars(row) if isinstance(row, DenoiserConfig | Denoiser) else row
            if not isinstance(row, Mapping):
                raise ConfigurationError(
                    f"must hold mu, r, max_spans, prefix, anywhere, proportion, not {row!r}", where=where
                )
            unknown, missing = set(row) - _KEYS, {"mu", "r"} - set(row)
            if unknown or missing:
                fault = f"{min(missing)} is missing" if missing else f"unknown key {min(map(str, unknown))!r}"
                raise ConfigurationError(fault, where=where, hint=f"The keys are {', '.join(sorted(_KEYS))}")
            keys = ("max_spans", "prefix", "anywhere")
            denoisers.append(Denoiser(row["mu"], row["r"], **{key: row[key] for key in keys if key in row}))
            proportions.append(row.get("proportion", 1.0))
        return cls(denoisers, proportions)

    def rows(self) -> list[dict[str, Any]]:
        """The mixture in its form in YAML, which `of` reads back."""
        pairs = zip(self.denoisers, self.proportions)
        # Without `anywhere` where it is false: older runs have none in the state that a continuation is compared with.
        return [
            {name: value for name, value in vars(d).items() if name != "anywhere" or value} | {"proportion": proportion}
            for d, proportion in pairs
        ]

    def names(self) -> list[str]:
        """A short name for each denoiser, unique in the mixture: "[R] mu=3 r=0.15"."""
        names = [f"{d.prefix or '-'} mu={d.mu:g} r={d.r:g}" for d in self.denoisers]
        return [name if names.count(name) == 1 else f"{name} #{index}" for index, name in enumerate(names)]

    def thresholds(self) -> np.ndarray:
        """Cumulative proportions in units of 2^-32, int64 (D,); a 32-bit word w draws the first denoiser above w."""
        thresholds = np.rint(np.cumsum(self.proportions) * 2.0**32).astype(np.int64)
        thresholds[-1] = 2**32
        return thresholds

    def tables(self, max_tokens: int, num_sentinels: int) -> tuple[np.ndarray, np.ndarray]:
        """(noise, spans) for every denoiser and every length up to max_tokens: int32 (D, max_tokens+1)."""
        lengths = np.arange(max_tokens + 1)
        tables = [denoiser.span_tables(lengths, num_sentinels) for denoiser in self.denoisers]
        return np.stack([noise for noise, _ in tables]), np.stack([spans for _, spans in tables])

    def max_lengths(self, max_tokens: int, num_sentinels: int) -> tuple[int, int]:
        """The longest encoder and decoder side of any piece of 2 to max_tokens tokens."""
        noise, spans = self.tables(max_tokens, num_sentinels)
        mode = np.array([[d.prefix is not None] for d in self.denoisers])
        encoder = mode + np.arange(max_tokens + 1) - noise + spans + 1
        return int(encoder[:, 2:].max()), int((noise + spans + 1)[:, 2:].max())

    def notes(self, max_tokens: int, num_sentinels: int) -> list[str]:
        """Warnings for the user: denoisers whose spans the sentinels limit, and from which length on."""
        notes = []
        lengths = np.arange(max_tokens + 1)
        _, spans = self.tables(max_tokens, num_sentinels)
        for name, denoiser, given in zip(self.names(), self.denoisers, spans):
            limited = np.flatnonzero(denoiser.wanted_spans(lengths) > given)
            if limited.size:
                notes.append(
                    f"denoiser {name}: the tokenizer's {num_sentinels} sentinels make fewer, longer spans "
                    f"in pieces of {limited[0]:,} tokens and more"
                )
        return notes

    def __len__(self) -> int:
        return len(self.denoisers)


def reconstruct(
    inputs: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, info: TokenizerInfo
) -> np.ndarray:
    """The document behind an example: the inputs, with each sentinel replaced by its span of the targets.

    DataError if inputs and targets do not belong together.
    """
    inputs, targets = np.asarray(inputs, np.int64), np.asarray(targets, np.int64)
    sentinels = sentinel_array(info)
    if not inputs.size or not targets.size or inputs[-1] != info.eos_id or targets[-1] != info.eos_id:
        raise DataError("inputs and targets must each end with EOS")
    body = inputs[:-1]
    if body.size and body[0] in info.mode_ids.values():
        body = body[1:]
    pieces: list[np.ndarray] = []
    at, target_at = 0, 0
    spans = int(np.isin(targets, sentinels).sum())
    for span in range(spans):
        here = np.flatnonzero(body[at:] == sentinels[span])
        following = np.flatnonzero(targets[target_at:] == (sentinels[span + 1] if span + 1 < spans else info.eos_id))
        if not here.size or not following.size or targets[target_at] != sentinels[span]:
            raise DataError(f"inputs and targets disagree about sentinel {span}")
        end = target_at + int(following[0] if span + 1 < spans else following[-1])
        pieces += [body[at : at + here[0]], targets[target_at + 1 : end]]
        at, target_at = at + int(here[0]) + 1, end
    return np.concatenate([*pieces, body[at:]])


def sentinel_array(info: TokenizerInfo) -> np.ndarray:
    """The sentinel ids in order, int64; TokenizerError if there are none."""
    if not info.sentinel_ids:
        raise TokenizerError(
            "the tokenizer has no sentinels <extra_id_0>, <extra_id_1>, …",
            hint="Train one with `fat5 tokenizer`, or use a T5 tokenizer",
        )
    return np.array(info.sentinel_ids, dtype=np.int64)


Mixture = str | MixtureOfDenoisers | Sequence[DenoiserConfig | Denoiser | Mapping[str, Any]]
"""What names or lists a mixture."""


def split_seed(seed: int) -> tuple[int, int]:
    """A seed in [0, 2^63) as the two 32-bit words of a Philox key; ConfigurationError for any other."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise ConfigurationError(f"must be a whole number in [0, 2^63), not {seed!r}", where="seed")
    return int(seed) & kernels.MASK32, int(seed) >> 32


def check_share(value: object, where: str) -> None:
    """Raises ConfigurationError unless a value can be a relative share."""
    if not _is_number(value) or not 0 < value <= LARGEST_SIZE:  # type: ignore[operator]
        raise ConfigurationError(f"must be a number above 0 and at most {LARGEST_SIZE:,}, not {value!r}", where=where)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _row(
    mu: float, r: float, prefix: str | None, proportion: float, max_spans: int | str = "max_token_length"
) -> dict[str, Any]:
    return {"mu": mu, "r": r, "max_spans": max_spans, "prefix": prefix, "proportion": proportion}


_KEYS = {"mu", "r", "max_spans", "prefix", "anywhere", "proportion"}

# One span of a quarter at the end: a single span is always a suffix, because segments alternate from a non-noise one.
_UL2_SEQUENTIAL = _row(4.0, 0.25, "[S]", 1.0, max_spans=1)

_FAT5 = [
    _row(3.0, 0.15, "[R]", 0.165),
    _row(8.0, 0.15, "[R]", 0.165),
    _row(4.0, 0.0, "[S]", 0.34, max_spans=1),
    _row(3.0, 0.5, "[X]", 0.0825),
    _row(8.0, 0.15, "[X]", 0.0825),
    _row(64.0, 0.15, "[X]", 0.0825),
    _row(64.0, 0.5, "[X]", 0.0825),
]

MIXTURES: dict[str, list[dict[str, Any]]] = {
    "fat5": _FAT5,
    "fat5-anywhere": [row | {"anywhere": row["r"] > 0} for row in _FAT5],
    "ul2": [
        _row(3.0, 0.15, "[R]", 1.0),
        _row(8.0, 0.15, "[R]", 1.0),
        _UL2_SEQUENTIAL,
        _row(3.0, 0.5, "[X]", 1.0),
        _row(8.0, 0.5, "[X]", 1.0),
        _row(64.0, 0.15, "[X]", 1.0),
        _row(64.0, 0.5, "[X]", 1.0),
    ],
    "t5": [_row(3.0, 0.15, None, 1.0)],
    "prefix-lm": [_row(2.0, 0.0, None, 1.0, max_spans=1)],
}
