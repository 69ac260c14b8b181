"""The configuration of a FAT5 model: T5's, with the choice of position encoding and the loss's options."""

import json
from pathlib import Path
from typing import Any

from transformers import T5Config

from fat5.errors import CheckpointError, ConfigurationError

POSITION_ENCODINGS = ("t5", "alibi", "rope", "fire", "absolute", "none")

# T5 v1.1 in form: gated GELU, untied embeddings, no dropout in pretraining.
_V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0, vocab_size=32768, d_kv=64)
PRESETS: dict[str, dict[str, Any]] = {
    "fat5-small": _V1_1 | dict(num_layers=12, num_decoder_layers=12, d_model=512, d_ff=2048, num_heads=8),
    "fat5-base": _V1_1 | dict(num_layers=12, num_decoder_layers=12, d_model=768, d_ff=3072, num_heads=12),
    "fat5-large": _V1_1 | dict(num_layers=24, num_decoder_layers=24, d_model=1024, d_ff=4096, num_heads=16),
    "fat5-demo": _V1_1 | dict(num_layers=4, num_decoder_layers=4, d_model=256, d_ff=768, num_heads=4, vocab_size=8192),
}


class FAT5Config(T5Config):
    """T5's configuration and what FAT5 adds to it.

    Args:
        position_encoding: "t5" (learned bucket bias), "alibi", "rope", "fire", "absolute" or "none".
        attention_dropout_rate: dropout of the attention weights; None is `dropout_rate`, as in T5.
        z_loss: weight of logsumexp(logits)^2 in the training loss.
        label_smoothing: share of each target spread over the vocabulary, in training loss.
        alibi_asymmetric: a slope for each side instead of one for both (encoder only; a decoder sees one side).
        rotary_fraction: share of each head's dimensions that rotate; rotary_base: base of the frequencies;
            rotary_scaling: positions are divided by it (linear interpolation).
        absolute_kind: "learned" or "sinusoidal"; max_positions: rows of the learned table.
        fire_width: hidden units of FIRE's network.

    Raises:
        ConfigurationError: a value that cannot work, naming the key.
    """

    model_type = "fat5"

    position_encoding: str = "t5"
    attention_dropout_rate: float | int | None = None
    z_loss: float | int = 0.0
    label_smoothing: float | int = 0.0
    alibi_asymmetric: bool = False
    rotary_fraction: float | int = 1.0
    rotary_base: float | int = 10_000.0
    rotary_scaling: float | int = 1.0
    absolute_kind: str = "learned"
    max_positions: int = 4096
    fire_width: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        # Stock T5 reads `tie_word_embeddings` as "scale the output by d_model^-0.5" and then forgets it; here it
        # also says
        # whether the output projection is the embedding.
        tied = kwargs.get("tie_word_embeddings")
        kwargs.setdefault("decoder_start_token_id", 0 if self.pad_token_id is None else self.pad_token_id)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = tied is not False
        self.validate()

    def validate(self) -> None:
        """Checks every key that FAT5 reads."""
        _one_of("position_encoding", self.position_encoding, POSITION_ENCODINGS)
        _one_of("absolute_kind", self.absolute_kind, ("learned", "sinusoidal"))
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "fire_width")
        for key in (*sizes, "max_positions", "relative_attention_max_distance"):
            if getattr(self, key) < 1:
                raise ConfigurationError(f"expected at least 1, got {getattr(self, key)}", where=key)
        if self.relative_attention_num_buckets < 4 or self.relative_attention_num_buckets % 2:
            raise ConfigurationError(
                f"expected an even number of at least 4, got {self.relative_attention_num_buckets}",
                where="relative_attention_num_buckets",
            )
        for key in ("dropout_rate", "attention_dropout_rate", "label_smoothing"):
            rate = getattr(self, key)
            if rate is not None and not 0.0 <= rate < 1.0:
                raise ConfigurationError(f"expected a number in [0, 1), got {rate}", where=key)
        if self.z_loss < 0.0:
            raise ConfigurationError(f"expected 0 or more, got {self.z_loss}", where="z_loss")
        if not 0.0 < self.rotary_fraction <= 1.0 or self.rotary_scaling <= 0.0 or self.rotary_base <= 1.0:
            raise ConfigurationError(
                "expected rotary_fraction in (0, 1], rotary_scaling above 0 and rotary_base above 1", where="rotary_*"
            )
        rotating = self.d_kv * self.rotary_fraction
        if self.position_encoding == "rope" and int(rotating) % 2:
            raise ConfigurationError(
                f"expected d_kv * rotary_fraction to be even, got {rotating:g}", where="rotary_fraction"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "FAT5Config":
        """The configuration called `name` (one of `PRESETS`), with `overrides` in its place."""
        _one_of("preset", name, tuple(PRESETS))
        return cls(**(PRESETS[name] | overrides))

    @property
    def attention_dropout(self) -> float:
        """Dropout of the attention weights."""
        return float(self.dropout_rate if self.attention_dropout_rate is None else self.attention_dropout_rate)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As in transformers; a T5 folder is a FAT5 configuration, any other family is refused."""
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        family = found.get("model_type", "t5")
        if family not in ("t5", "fat5"):
            raise CheckpointError(
                f"holds a model of type {family!r}, not t5 or fat5",
                where=pretrained_model_name_or_path,
                hint="give a folder written by FAT5, or a T5 checkpoint",
            )
        return found | {"model_type": "fat5"}, kwargs

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes config.json; with T5 positions it is a stock T5 configuration, readable without FAT5."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.position_encoding != "t5":
            return
        path = Path(save_directory) / "config.json"
        written = json.loads(path.read_text())
        default = FAT5Config()
        for key in _ADDED_KEYS:
            if key in written and written[key] == getattr(default, key):
                del written[key]
        written["model_type"] = "t5"
        if written.get("architectures"):
            written["architectures"] = [name.replace("FAT5", "T5", 1) for name in written["architectures"]]
        # Stock T5Config drops the first of these and reads the second; together they say everything to both.
        written["tie_word_embeddings"] = self.tie_word_embeddings
        written["scale_decoder_outputs"] = self.scale_decoder_outputs
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


_ADDED_KEYS = tuple(key for key in FAT5Config.__annotations__ if key != "model_type")


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"expected one of {', '.join(allowed)}, got {value!r}", where=key)
