"""The configuration of a FAT5 model: T5's, with a choice of position encoding and options of the loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MT5Config, T5Config, UMT5Config
from transformers.activations import ACT2FN

from fat5.errors import CheckpointError, ConfigurationError
from fat5.files import is_count
from fat5.model.flash_t5 import translate_configuration

FAMILIES: dict[str, Any] = {"t5": T5Config, "mt5": MT5Config, "umt5": UMT5Config}
MOST_LABELS = 1 << 20
EXACT_ATTENTION = ("eager", "sdpa", "flex_attention", "fat5")
DEFAULT_FORM = {"FAT5ForSequenceClassification": "encoder", "FAT5ForQuestionAnswering": "encoder-decoder"}
POSITION_ENCODINGS = ("t5", "alibi", "rope", "fire", "absolute", "none")
# Under these, padding on the left would shift the tokens, so that it is always left out.
COUNTED_FROM_THE_FIRST_TOKEN = ("fire", "absolute")

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
        family: "t5" (v1.0, v1.1, FLAN, ByT5), "mt5" or "umt5", whose every layer has a bias table of its own. It is
            the model_type under which stock classes read what `save_pretrained` writes.
        head_form: what classification and question answering read: "encoder", "encoder-decoder" (the form of the
            stock classes), "encoder-eos" (a text's class from the encoder's state at its last EOS, as in the first
            FAT5), or None for the class's own default.
        compute_padding: whether an encoder computes its hidden states at padding, as stock T5 does, or leaves them out,
            which is faster, and returns zeros. None: computes them unless a decoder follows, which does not read them.

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
    family: str = "t5"
    head_form: str | None = None
    compute_padding: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Stock T5 reads `tie_word_embeddings` as "scale the output by d_model^-0.5" and then forgets it; here it
        # also says whether the output projection is the embedding.
        tied = kwargs.get("tie_word_embeddings")
        kwargs.setdefault("decoder_start_token_id", 0 if self.pad_token_id is None else self.pad_token_id)
        if self.family == "t5" and kwargs.get("model_type") in FAMILIES:  # the keys of a stock configuration
            self.family = kwargs["model_type"]
        _one_of("family", self.family, tuple(FAMILIES))
        if self.family != "t5":
            kwargs.setdefault("scale_decoder_outputs", _stock_scales(self.family, tied))
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = True if tied is None else tied
        self.validate()

    def validate(self) -> None:
        """Checks every key that FAT5 reads."""
        for key, allowed in _CHOICES.items():
            _one_of(key, getattr(self, key), allowed)
        for key, (kind, least, most, ends) in _BOUNDS.items():
            value = getattr(self, key)
            if value is None and key == "attention_dropout_rate":
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ConfigurationError(f"expected a {'whole ' * (kind is int)}number, got {value!r}", where=key)
            above = value > least if ends[0] == "(" else value >= least
            below = value < most if ends[1] == ")" else value <= most
            if not (above and below):
                wanted = (
                    f"{least:,} to {most:,}" if ends == "[]" else f"a number in {ends[0]}{least}, {most:,}{ends[1]}"
                )
                raise ConfigurationError(f"expected {wanted}, got {value:,}", where=key)
        for key in ("pad_token_id", "decoder_start_token_id", "eos_token_id", "bos_token_id"):
            held = getattr(self, key, None)
            for token in held if isinstance(held, list) and key == "eos_token_id" else [held]:
                if token is not None and not (is_count(token) and token < self.vocab_size):
                    raise ConfigurationError(f"expected a token of the {self.vocab_size:,}, got {token!r}", where=key)
        gate, _, activation = self.feed_forward_proj.rpartition("-")
        rotating = self.d_kv * self.rotary_fraction
        for key, is_wrong, wanted in (
            (
                "compute_padding",
                self.compute_padding and self.position_encoding in COUNTED_FROM_THE_FIRST_TOKEN,
                f"false or null, as {self.position_encoding} positions count from a text's first token",
            ),
            (
                "feed_forward_proj",
                gate not in ("", "gated") or activation not in ACT2FN,
                "an activation of transformers, alone or after gated-",
            ),
            ("relative_attention_num_buckets", self.relative_attention_num_buckets % 2, "an even number"),
            (
                "rotary_fraction",
                self.position_encoding == "rope" and int(rotating) % 2,
                f"an even d_kv * rotary_fraction, which is {rotating:g}",
            ),
        ):
            if is_wrong:
                raise ConfigurationError(f"expected {wanted}, got {getattr(self, key)!r}", where=key)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "FAT5Config":
        """The configuration called `name` (one of `PRESETS`), with `overrides`."""
        _one_of("preset", name, tuple(PRESETS))
        return cls(**(PRESETS[name] | overrides))

    @property
    def attention_dropout(self) -> float:
        """Dropout of the attention weights."""
        return float(self.dropout_rate if self.attention_dropout_rate is None else self.attention_dropout_rate)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As in transformers; a folder of T5's families is a FAT5 configuration, any other is refused."""
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = _as_fat5(found, pretrained_model_name_or_path)
        if "feed_forward_proj" in kwargs:  # two keys of the file were derived from its own
            found = {key: value for key, value in found.items() if key not in ("dense_act_fn", "is_gated_act")}
            found["feed_forward_proj"] = kwargs.pop("feed_forward_proj")
        return found, kwargs

    @classmethod
    def from_stock(cls, config: Any) -> "FAT5Config":
        """The FAT5 configuration of the model that a T5Config, MT5Config or UMT5Config of transformers describes.

        Stock configurations no longer say whether the output projection is tied to the embeddings: it is taken to be,
        and loading decides by the weights.
        """
        return cls.from_dict(_as_fat5(config.to_dict(), type(config).__name__))

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes config.json: that of the stock class of this family if it computes the same, else a FAT5 one."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory) / "config.json"
        written = json.loads(path.read_text())
        classes = written.get("architectures") or []
        if self._is_stock(classes[0] if classes else ""):
            default = FAT5Config()
            added = {key for key in _ADDED_KEYS if key in written and written[key] == getattr(default, key)}
            # Families have different defaults, so every key that a stock class reads is written.
            written = {key: getattr(self, key) for key in _STOCK_KEYS} | written
            written = {key: value for key, value in written.items() if key not in added | {"family"}}
            written["model_type"] = self.family
            written["architectures"] = [name.replace("FAT5", _CLASS_PREFIX[self.family], 1) for name in classes] or None
            written["tie_word_embeddings"] = self.tie_word_embeddings
        # Stock T5Config drops tie_word_embeddings and reads this instead.
        written["scale_decoder_outputs"] = self.scale_decoder_outputs
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")

    def _is_stock(self, class_name: str) -> bool:
        """Whether the stock class of this family and name computes what ours does."""
        if self.position_encoding != "t5":
            return False
        if self.family != "t5" and self.scale_decoder_outputs != _stock_scales(self.family, self.tie_word_embeddings):
            return False
        if class_name not in DEFAULT_FORM:
            return True
        return (self.head_form or DEFAULT_FORM[class_name]) == "encoder-decoder"


_CHOICES: dict[str, tuple[Any, ...]] = {
    "position_encoding": POSITION_ENCODINGS,
    "absolute_kind": ("learned", "sinusoidal"),
    "head_form": (None, "encoder", "encoder-eos", "encoder-decoder"),
    **dict.fromkeys(("alibi_asymmetric", "scale_decoder_outputs", "tie_word_embeddings"), (True, False)),
    "compute_padding": (True, False, None),
}
# Key → type, least, most, and whether the ends belong to the range. Sizes beyond these overflow, or build layers for
# hours.
_BOUNDS: dict[str, tuple[Any, int, int, str]] = {
    **dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "fire_width"), (int, 1, 1 << 24, "[]")),
    **dict.fromkeys(("max_positions", "relative_attention_max_distance"), (int, 1, 1 << 24, "[]")),
    **dict.fromkeys(("num_layers", "num_decoder_layers"), (int, 1, 4096, "[]")),
    "relative_attention_num_buckets": (int, 4, 1 << 24, "[]"),
    **dict.fromkeys(("z_loss", "initializer_factor"), (int | float, 0, 1000, "[]")),
    **dict.fromkeys(("dropout_rate", "attention_dropout_rate", "label_smoothing"), (int | float, 0, 1, "[)")),
    "layer_norm_epsilon": (int | float, 0, 1, "[]"),
    "rotary_base": (int | float, 2, 10**12, "[]"),
    "rotary_fraction": (int | float, 0, 1, "(]"),
    "rotary_scaling": (int | float, 0, 1_000_000, "(]"),
}
_STOCK_KEYS = T5Config.__annotations__.keys() - {"model_type", "keys_to_ignore_at_inference", "attribute_map"}
_ADDED_KEYS = tuple(key for key in FAT5Config.__annotations__ if key != "model_type")
MODEL_KEYS = {*_STOCK_KEYS, *_ADDED_KEYS, "tie_word_embeddings"} - {"is_decoder", "is_encoder_decoder"}
"""The keys that say what a model computes."""
_CLASS_PREFIX = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}


def _as_fat5(found: dict[str, Any], where: object) -> dict[str, Any]:
    """FAT5's keys from those of a config.json."""
    _check_types(found)
    found_type = found.get("model_type", "t5")
    if found_type == "flash_t5":
        found = translate_configuration(found, where)
    elif found_type in FAMILIES:
        family = (found.get("family") or found_type) if found_type == "t5" else found_type
        # Keys that the file leaves out have the family's defaults, which are not T5's.
        known = {key: value for key, value in found.items() if key in FAMILIES[family].__annotations__}
        stock = {} if family == "t5" else FAMILIES[family](**known).to_dict()
        stock.pop("tie_word_embeddings", None)
        found = stock | found | {"family": family}
        classes = found.get("architectures") or [""]
        if classes[0].endswith(("T5ForSequenceClassification", "T5ForQuestionAnswering")):
            found.setdefault("head_form", "encoder-decoder")
    elif found_type != "fat5":
        raise CheckpointError(
            f"holds a model of type {found_type!r}, not {', '.join(FAMILIES)}, fat5 or flash_t5",
            where=where,
            hint="give a folder written by FAT5, or a checkpoint of the T5 family",
        )
    return found | {"model_type": "fat5"}


def _check_types(found: dict[str, Any]) -> None:
    """Raises ConfigurationError where a key that transformers reads unchecked has a value of another type."""
    for key, (wanted, fits) in _UNCHECKED.items():
        value = found.get(key)
        if key in found and not fits(value) and (value is not None or key in _NEVER_NULL):
            raise ConfigurationError(f"expected {wanted}, got {str(value)[:60]!r}", where=key)


def _is_dtype(value: Any) -> bool:
    return isinstance(getattr(torch, str(value).removeprefix("torch."), None), torch.dtype)


def _are_names(value: Any) -> bool:
    # The first FAT5's folders have one name without a list.
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(str(key).isdecimal() for key in value)


_NEVER_NULL = ("num_labels", "dense_act_fn", "is_gated_act")
_UNCHECKED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("text_config", "text_encoder", "encoder", "decoder", "generator", "experts_implementation"),
        ("nothing, as a T5 has no such part", lambda _: False),
    ),
    **dict.fromkeys(
        ("attn_implementation", "_attn_implementation"),
        (f"one of {', '.join(EXACT_ATTENTION)}", lambda value: value in EXACT_ATTENTION),
    ),
    "model_type": ("a name", lambda value: isinstance(value, str)),
    "family": ("t5, mt5 or umt5", lambda value: value in tuple(FAMILIES)),
    "architectures": ("a list of names", _are_names),
    "dense_act_fn": ("an activation of transformers", lambda value: isinstance(value, str) and value in ACT2FN),
    "is_gated_act": ("true or false", lambda value: isinstance(value, bool)),
    "dtype": ("the name of a dtype", _is_dtype),
    "torch_dtype": ("the name of a dtype", _is_dtype),
    "id2label": ("number → label", _are_labels),
    "label2id": ("label → number", lambda value: isinstance(value, dict)),
    "num_labels": (f"1 to {MOST_LABELS:,}", lambda value: is_count(value) and 1 <= value <= MOST_LABELS),
    "quantization_config": ("a quant_method", lambda value: isinstance(value, dict) and "quant_method" in value),
}


def _stock_scales(family: str, tied: bool | None) -> bool:
    """Whether the installed stock class multiplies the decoder's output by d_model^-0.5 (decision 0070)."""
    return family == "umt5" and bool(UMT5Config(tie_word_embeddings=tied is not False).tie_word_embeddings)


def _one_of(key: str, value: object, allowed: tuple[Any, ...]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in allowed):
        words = [{True: "true", False: "false", None: "null"}.get(one, one) for one in allowed]
        wanted = ", ".join(words[:-1]) + f" or {words[-1]}"
        raise ConfigurationError(f"expected {wanted}, got {value!r}", where=key)
