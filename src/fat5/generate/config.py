"""The keys of decoding; imports no torch, so that `fat5 generate --help` answers at once."""

from dataclasses import dataclass
from typing import Any, Literal

from fat5.errors import ConfigurationError

DEFAULT_LENGTH = 64
LOOPS = ("auto", "fat5", "stock")


@dataclass
class Decoding:
    """How an answer is decoded. The model's generation_config.json supplies the keys that are not given."""

    max_new_tokens: int | None = None
    """Most tokens of one answer; 64 if the model's generation_config.json names no limit"""
    num_beams: int | None = None
    """Above 1, beam search"""
    sample: bool | None = None
    """Draw tokens at random instead of taking the likeliest"""
    temperature: float | None = None
    """In sampling, above 1 flattens the distribution, below 1 sharpens it"""
    top_k: int | None = None
    """In sampling, keep this many of the likeliest tokens; 0 keeps all"""
    top_p: float | None = None
    """In sampling, keep the smallest set of tokens with this probability"""
    repetition_penalty: float | None = None
    """Above 1, tokens already written become less likely (Keskar et al. 2019)"""
    batch_size: int = 8
    """Prompts decoded together"""
    seed: int = 0
    """Seed of the sampling"""
    loop: Literal["auto", "fat5", "stock"] = "auto"
    """fat5 is our decoding loop, stock is generate of transformers; auto takes ours unless a setting needs stock"""

    cuda_graphs: bool = True
    """On a GPU, from two batches on, record the launches of a decoding step once and replay them (docs/generate.md)"""

    def __post_init__(self) -> None:
        for names, is_right, fault in (
            (("max_new_tokens", "num_beams", "batch_size"), lambda x: x >= 1, "is below 1"),
            (("temperature", "repetition_penalty"), lambda x: x > 0, "is not above 0"),
            (("seed",), lambda x: 0 <= x < 1 << 63, "is not from 0 up to 2^63 - 1"),
            (("top_k",), lambda x: x >= 0, "is below 0; 0 keeps all"),
            (("top_p",), lambda x: 0 < x <= 1, "is not in (0, 1]; 1 keeps all"),
            (("loop",), lambda x: x in LOOPS, f"is none of {', '.join(LOOPS)}"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not is_right(value):
                    raise ConfigurationError(f"{value} {fault}", where=name)

    def fields(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The fields of `GenerationConfig` to ask for: the keys given here, and those that every answer needs."""
        own = model.generation_config
        length = self.max_new_tokens or own.max_new_tokens or (own.max_length or 1 + DEFAULT_LENGTH) - 1
        if not (own.do_sample if self.sample is None else self.sample):
            for name in ("temperature", "top_k", "top_p"):
                if getattr(self, name) is not None:
                    raise ConfigurationError("acts in sampling only", where=name, hint="Add --sample, or leave it out")
        same = ("num_beams", "temperature", "top_k", "top_p", "repetition_penalty")
        asked = {name: getattr(self, name) for name in same} | {
            "max_new_tokens": max(length, 1),
            "do_sample": self.sample,
            # One answer a prompt, as a tensor.
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
        }
        needed = {
            "eos_token_id": tokenizer.info.eos_id,
            "pad_token_id": tokenizer.info.pad_id,
            "decoder_start_token_id": model.config.decoder_start_token_id if own.bos_token_id is None else None,
        }
        asked |= {name: token for name, token in needed.items() if getattr(own, name) is None}
        return {name: value for name, value in asked.items() if value is not None}
