"""The keys of `fat5 audit`; imports no torch and no numba, so that its --help answers at once."""

from dataclasses import dataclass, field

from fat5.data.examples.config import DenoiserConfig


@dataclass
class AuditConfig:
    """Shows what the model sees: examples, rates against the specification, lengths, fill, budgets, fertility.

    Args:
        inputs: prepared folders.
        output_dir: folder for audit.json and audit.png.
        weights: relative share of the tokens of each folder; all equal if empty.
        split: train or validation.
        mixture: fat5, ul2, t5, prefix-lm, or a list of {mu, r, max_spans, prefix, proportion}.
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
