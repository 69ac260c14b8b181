"""Each field of `GenerationConfig`: obeyed by our decoding loop, left to stock `generate`, or without effect."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from fat5.errors import ConfigurationError
from fat5.files import is_count, is_number

# Our loop obeys these, whatever their value.
DONE = frozenset(
    {
        "max_new_tokens", "max_length", "min_new_tokens", "min_length",
        "do_sample", "temperature", "top_k", "top_p", "num_beams",
        "repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
        "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
    }
)  # fmt: skip
# These change no token: caches, compilation, outputs besides tokens, details of an assistant model.
WITHOUT_EFFECT = frozenset(
    {
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size",
        "compile_config", "disable_compile", "continuous_batching_config",
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size",
        "transformers_version",
    }
)  # fmt: skip
# Only stock `generate` obeys these. The value here is the one that changes nothing.
STOCK: dict[str, Any] = {
    **dict.fromkeys((
        "max_time", "stop_strings", "sequence_bias", "exponential_decay_length_penalty", "watermarking_config",
        "prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type", "penalty_alpha", "dola_layers",
        "constraints", "force_words_ids",
    )),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits", "token_healing", "use_mtp"), False),
    "num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0,
}  # fmt: skip
# The same, but without effect unless in beam search, or unless sampling.
STOCK_AMONG_BEAMS: dict[str, Any] = {"length_penalty": 1.0, "early_stopping": False}
STOCK_IN_SAMPLING: dict[str, Any] = {
    "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


def _is_token(value: Any, size: int) -> bool:
    return is_count(value) and value < size


def _are_tokens(value: Any, size: int) -> bool:
    """One id or several; -1 or an id beyond the vocabulary never occurs."""
    return all(is_count(token) or (type(token) is int and token == -1) for token in _as_list(value))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_KINDS: dict[str, Callable[[Any, int], bool]] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "forced_bos_token_id"), _is_token),
    "decoder_start_token_id": lambda value, size: all(_is_token(token, size) for token in _as_list(value)),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), _are_tokens),
    **dict.fromkeys(
        ("suppress_tokens", "begin_suppress_tokens"),
        lambda value, size: isinstance(value, list) and _are_tokens(value, size),
    ),
    **dict.fromkeys((
        "num_beams", "max_new_tokens", "max_length", "min_new_tokens", "min_length", "top_k",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    ), lambda value, _: is_count(value)),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), lambda value, _: is_number(value)),
}  # fmt: skip


def settings(model: Any, how: dict[str, Any]) -> GenerationConfig:
    """The fields for one call: `how`, and the model's own generation configuration for the others.

    Raises:
        ValueError: `how` names an unknown field.
        ConfigurationError: the model's own configuration has an unusable value.
    """
    for name, fits in _KINDS.items():
        value = getattr(model.generation_config, name, None)
        if value is not None and not fits(value, model.config.vocab_size):
            raise ConfigurationError(
                f"{name} is {str(value)[:60]!r}", where="generation_config.json", hint="Change it in the model's folder"
            )
    config = copy.deepcopy(model.generation_config)
    unknown = sorted(name for name in how if not hasattr(config, name))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no field of GenerationConfig")
    for name, value in how.items():
        setattr(config, name, value)
    return config


def left_to_stock(config: GenerationConfig) -> list[str]:
    """Names of the fields whose values only stock `generate` obeys, including every field unknown to us."""
    found = []
    among_beams, sampling = (config.num_beams or 1) > 1, bool(config.do_sample)
    for name, value in vars(config).items():
        if value is None or name.startswith("_") or name in DONE | WITHOUT_EFFECT:
            continue
        if (name in STOCK_AMONG_BEAMS and not among_beams) or (name in STOCK_IN_SAMPLING and not sampling):
            continue
        if value != (STOCK | STOCK_AMONG_BEAMS | STOCK_IN_SAMPLING).get(name):
            found.append(name)
    if among_beams and sampling:
        found.append("do_sample with num_beams")
    if isinstance(config.decoder_start_token_id, (list, tuple)):
        found.append("decoder_start_token_id")  # one a prompt
    return sorted(found)


def processors(model: Any, config: GenerationConfig, length: int, prompts: Tensor, ends: Tensor) -> LogitsProcessorList:
    """The logits processors of transformers, in its order, for up to `length` tokens behind the start token.

    `config` is changed; prompts (B, L) are the encoder's ids, ends (E,) the ids that end an answer.
    """
    config.max_length = 1 + length
    config._eos_token_tensor = ends if len(ends) else None
    if config.min_new_tokens is not None:
        config.min_length = None
    if config.top_k is None:
        config.top_k = 50
    return model._get_logits_processor(  # type: ignore[no-any-return]
        config, input_ids_seq_length=1, encoder_input_ids=prompts, device=prompts.device
    )
