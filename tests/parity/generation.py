"""The ways of generating that are compared between a stock model and FAT5 from its folder, and by how much they agree.

The tests assert that every token is the same; benchmarks/parity.py writes the shares down.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from fat5.generate.decoding import generate as our_loop
from stock import fat5_like, rows

LENGTH = 16
STATIC = {"cache_implementation": "static", "disable_compile": True}
START = torch.tensor([[0, 5, 9]] * 3)
START_MASK = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1]])


def prompts(side: str = "right") -> dict[str, Tensor]:
    """Three of unequal length, the same each time."""
    torch.manual_seed(11)
    return {key: value for key, value in rows(side).items() if key != "labels"}


def allowed(row: int, written: Tensor) -> list[int]:
    """A constraint that depends on the row and on what is written: two tokens, and later the end."""
    length = len(written)
    return [(7 * length + row) % 90 + 2, (3 * length + 5 * row) % 90 + 2, *([1] if length > 8 else [])]


# Of stock `generate` on both classes.
PLAIN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": STATIC,
    "beams": {"num_beams": 3},
    "beams, static cache": {"num_beams": 3} | STATIC,
    "beams: length penalty, early stopping, 3 returned": {
        "num_beams": 4, "length_penalty": 0.6, "early_stopping": True, "num_return_sequences": 3,
    },
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "sampling, 3 returned": {"do_sample": True, "num_return_sequences": 3},
    "sampling among beams": {"do_sample": True, "num_beams": 3},
    "constrained prefix": {"prefix_allowed_tokens_fn": allowed},
    "constrained prefix, beams": {"prefix_allowed_tokens_fn": allowed, "num_beams": 3},
    "forbidden words": {"bad_words_ids": [[3], [4, 5]], "suppress_tokens": [6, 7]},
    "forced first and last token": {"forced_bos_token_id": 7, "forced_eos_token_id": 1},
    "no pair twice, at least 9": {"no_repeat_ngram_size": 2, "min_new_tokens": 9},
    "repetition penalty": {"repetition_penalty": 1.7, "encoder_repetition_penalty": 1.2},
    "decoder_input_ids given": {"decoder_input_ids": START},
    "decoder_input_ids given, masked": {"decoder_input_ids": START, "decoder_attention_mask": START_MASK},
    "decoder_input_ids given, static cache": {"decoder_input_ids": START} | STATIC,
    "decoder_input_ids given, masked, static cache": {
        "decoder_input_ids": START, "decoder_attention_mask": START_MASK,
    } | STATIC,
    "decoder_input_ids given, beams": {"decoder_input_ids": START, "num_beams": 3},
}  # fmt: skip
# Of our own decoding loop on FAT5's class, beside stock `generate` on the stock class.
LOOP: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.5},
    "sample": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "sample-all": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3},
    "beam-penalty": {"num_beams": 4, "repetition_penalty": 1.3},
}


def with_plain(how: dict[str, Any], side: str = "right") -> Callable[[Any, Any], tuple[int, int]]:
    def compare(stock: Any, ours: Any) -> tuple[int, int]:
        return same(*(seeded(model.generate, **prompts(side), max_new_tokens=LENGTH, **how) for model in (stock, ours)))

    return compare


def with_embeddings(stock: Any, ours: Any) -> tuple[int, int]:
    batch = prompts()
    embedded = stock.shared(batch["input_ids"])
    return same(
        *(
            model.generate(inputs_embeds=embedded, attention_mask=batch["attention_mask"], max_new_tokens=LENGTH)
            for model in (stock, ours)
        )
    )


def with_memory(stock: Any, ours: Any) -> tuple[int, int]:
    batch, written = prompts(), []
    for model in (stock, ours):
        memory = model.get_encoder()(**batch)
        mask = batch["attention_mask"]
        written.append(model.generate(encoder_outputs=memory, attention_mask=mask, max_new_tokens=LENGTH))
    return same(*written)


def with_streamer(stock: Any, ours: Any) -> tuple[int, int]:
    """What comes out of the stream, token by token."""

    class Stream:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, tokens: Tensor) -> None:
            self.tokens += tokens.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streams = [Stream(), Stream()]
    for model, stream in zip((stock, ours), streams):
        model.generate(prompts()["input_ids"][:1], max_new_tokens=LENGTH, streamer=stream)
    return same(*(torch.tensor([stream.tokens]) for stream in streams))


def with_an_assistant(stock: Any, ours: Any) -> tuple[int, int]:
    batch = {key: value[:1] for key, value in prompts().items()}
    return same(*(model.generate(**batch, max_new_tokens=LENGTH, assistant_model=model) for model in (stock, ours)))


def by_hand(cache: Callable[[Any, int], Any]) -> Callable[[Any, Any], tuple[int, int]]:
    """One, two, then one token a call, into an EncoderDecoderCache of this kind."""

    def compare(stock: Any, ours: Any) -> tuple[int, int]:
        batch, written = prompts(), []
        for model in (stock, ours):
            past = EncoderDecoderCache(cache(model, LENGTH), cache(model, 150))
            tokens, out = torch.zeros(3, 1, dtype=torch.long), []
            for step in range(LENGTH - 1):
                if step == 1:
                    tokens = torch.cat([tokens, tokens + 1], dim=1)
                logits = model(**batch, decoder_input_ids=tokens, past_key_values=past).logits
                tokens = logits[:, -1:].argmax(dim=-1)
                out.append(tokens)
            written.append(torch.cat(out, dim=1))
        return same(*written)

    return compare


def with_our_loop(how: dict[str, Any]) -> Callable[[Any, Any], tuple[int, int]]:
    def compare(stock: Any, ours: Any) -> tuple[int, int]:
        batch = prompts()
        want = seeded(stock.generate, **batch, max_new_tokens=LENGTH, **how)
        got = seeded(our_loop, ours, **batch, max_new_tokens=LENGTH, **how)
        return same(want, got, end=1)

    return compare


MODES: dict[str, Callable[[Any, Any], tuple[int, int]]] = {
    **{name: with_plain(how) for name, how in PLAIN.items()},
    "greedy, padded left": with_plain({}, "left"),
    "beams, padded left": with_plain({"num_beams": 3}, "left"),
    "sampling, padded left": with_plain({"do_sample": True, "top_k": 20}, "left"),
    "inputs_embeds": with_embeddings,
    "encoder_outputs": with_memory,
    "streamer": with_streamer,
    "assisted": with_an_assistant,
    "EncoderDecoderCache by hand, dynamic": by_hand(lambda model, length: DynamicCache()),
    "EncoderDecoderCache by hand, static": by_hand(
        lambda model, length: StaticCache(config=model.config, max_cache_len=length)
    ),
    **{f"our decoding loop: {name}": with_our_loop(how) for name, how in LOOP.items()},
}


def agreement(stock: Any, mode: str) -> tuple[int, int]:
    """Tokens that are the same, and all tokens that the stock model wrote."""
    return MODES[mode](stock.eval(), fat5_like(stock).eval())


def seeded(write: Callable[..., Tensor], *args: Any, **how: Any) -> Tensor:
    torch.manual_seed(5)
    return write(*args, **how)


def same(want: Tensor, got: Tensor, end: int | None = None) -> tuple[int, int]:
    """Equal tokens and all; with `end`, up to and with each row's, since stock beam search pads with it."""
    if want.shape != got.shape:
        return 0, want.numel()
    if end is None:
        return int((want == got).sum()), want.numel()
    ended = ((want == end).cumsum(dim=1) - (want == end).long()) > 0
    return int(((want == got) & ~ended).sum()), int((~ended).sum())


def until_end(rows: Tensor, ends: int | list[int]) -> list[list[int]]:
    """Each row up to its end, since stock beam search pads with another token."""
    ends = {ends} if isinstance(ends, int) else set(ends)
    stops = [next((i for i, token in enumerate(row) if i and token in ends), len(row)) for row in rows.tolist()]
    return [row[: stop + 1] for row, stop in zip(rows.tolist(), stops)]
