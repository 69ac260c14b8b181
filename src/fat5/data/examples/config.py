"""The keys of batches, mixtures and `fat5 audit`; imports no torch and no numba, so that --help answers at once."""

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from fat5.errors import ConfigurationError, check_whole

BUDGET_MULTIPLE = 128
EXAMPLE_TOKENS = 16  # encoder tokens of a pack per example it may hold


def rounded_up(tokens: float) -> int:
    """The next multiple of 128."""
    return -(-math.ceil(tokens) // BUDGET_MULTIPLE) * BUDGET_MULTIPLE


class Budget(NamedTuple):
    """The limits of one pack; a pack of tiny documents closes at `max_examples`. The planner chooses among `window`."""

    encoder_tokens: int
    decoder_tokens: int
    max_examples: int
    window: int


@dataclass(frozen=True)
class BatchConfig:
    """The shapes of training.

    Attributes:
        max_tokens: raw tokens of one example; longer documents are cut into consecutive pieces.
        encoder_tokens: encoder tokens of a pack, a multiple of 128.
        decoder_tokens: decoder tokens of a pack, a multiple of 128; `fat5 audit` suggests it.
        packs_per_step: packs of one optimizer step, in all processes and micro-batches.
        packs_per_micro_batch: packs of one forward pass of a process.
        window: waiting examples that the packing chooses from.
        max_examples: most examples of a pack; null for encoder_tokens / 16.
    """

    max_tokens: int = 1024
    encoder_tokens: int = 16384
    decoder_tokens: int = 8192
    packs_per_step: int = 8
    packs_per_micro_batch: int = 1
    window: int = 1024
    max_examples: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "max_examples" or value is not None:
                check_whole(value, f"data.{item.name}")
        for name in ("encoder_tokens", "decoder_tokens"):
            value = getattr(self, name)
            if value % BUDGET_MULTIPLE:
                what = f"must be a multiple of {BUDGET_MULTIPLE}, not {value}"
                raise ConfigurationError(what, where=f"data.{name}", hint=f"Try {rounded_up(value)}")
        if self.packs_per_step % self.packs_per_micro_batch:
            raise ConfigurationError(
                f"{self.packs_per_step} is not a multiple of packs_per_micro_batch ({self.packs_per_micro_batch})",
                where="data.packs_per_step",
            )

    @property
    def examples_per_pack(self) -> int:
        """Most examples of a pack."""
        return self.max_examples if self.max_examples is not None else max(8, self.encoder_tokens // EXAMPLE_TOKENS)

    def budget(self) -> Budget:
        """The limits of the packing."""
        return Budget(self.encoder_tokens, self.decoder_tokens, self.examples_per_pack, self.window)

    def check_longest(self, encoder: int, decoder: int) -> None:
        """Raises ConfigurationError if the longest example does not fit into a pack."""
        sides = (("encoder", encoder, self.encoder_tokens), ("decoder", decoder, self.decoder_tokens))
        for side, longest, room in sides:
            if longest > room:
                raise ConfigurationError(
                    f"{room:,} is smaller than one example: a piece of max_tokens {self.max_tokens:,} can have "
                    f"{longest:,} {side} tokens",
                    where=f"data.{side}_tokens",
                    hint=f"Raise {side}_tokens to at least {rounded_up(longest)}, or lower max_tokens",
                )


@dataclass
class DenoiserConfig:
    """One row of a mixture written out in YAML."""

    mu: float
    """Mean span length; if r is 0, the prefix kept is a mu-th of the text"""
    r: float
    """Corruption rate; 0 is the sequential denoiser, which needs max_spans 1"""
    max_spans: int | str | None = None
    """Most spans of a text: a number, or max_token_length for no limit"""
    prefix: str | None = None
    """Mode token before the inputs ([R], [S], [X]), or null"""
    anywhere: bool = False
    """Spans lie anywhere; by default the last one ends the text, as in T5"""
    proportion: float = 1.0
    """Relative share of the examples"""


@dataclass
class AuditConfig:
    """Shows what the model sees: examples, rates against the specification, lengths, fill, budgets, fertility.

    Args:
        inputs: prepared folders.
        output_dir: folder for audit.json and audit.png.
        weights: relative share of the tokens of each folder; all equal if empty.
        split: train or validation.
        mixture: fat5, fat5-anywhere, ul2, t5, prefix-lm, or a list of {mu, r, max_spans, prefix, anywhere, proportion}.
        max_tokens: raw tokens of one example.
        encoder_tokens: encoder tokens of a pack.
        decoder_tokens: decoder tokens of a pack; 0 takes what goes with encoder_tokens.
        window: examples the packing looks ahead to.
        tokens: raw tokens to measure.
        examples: examples shown of each denoiser.
        seed: of order and noise.
    """

    inputs: list[str] = field(default_factory=list)
    output_dir: str = "audit"
    weights: list[float] = field(default_factory=list)
    split: str = "train"
    mixture: str | list[DenoiserConfig] = "fat5"
    max_tokens: int = 1024
    encoder_tokens: int = 16384
    decoder_tokens: int = 0
    window: int = 1024
    tokens: int = 1_000_000
    examples: int = 1
    seed: int = 0
