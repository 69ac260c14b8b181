"""Prompts in, completions out: fill the blanks of a text, continue it, or hand it to the model as it is."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Literal

import torch

from fat5.data import Tokenizer
from fat5.errors import ConfigurationError, DataError, FAT5Error, TokenizerError
from fat5.machine import GIB, free_memory

# A blank is written as the sentinel itself or as three underscores, whichever the user finds easier to type.
BLANK = re.compile(r"<extra_id_\d+>|_{3,}")
MODES = ("auto", "infill", "continue", "text")
LOOPS = ("auto", "fat5", "stock")
DEFAULT_LENGTH = 64


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        prompt: as given.
        completion: what the model wrote: the spans of an infill (joined by " … "), the continuation, or the output.
        text: the whole: the prompt with its blanks filled or its continuation appended; the output text in mode "text".
    """

    prompt: str
    completion: str
    text: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


@dataclass
class Decoding:
    """How an answer is written, token by token. What is not given is what the model's generation_config.json says."""

    max_new_tokens: int | None = None
    """Limit of one answer; 64 where the model's generation_config.json has none"""
    num_beams: int | None = None
    """Above 1, beam search"""
    sample: bool | None = None
    """Draw tokens rather than take the likeliest"""
    temperature: float | None = None
    """Flattens (above 1) or sharpens the distribution when sampling"""
    top_k: int | None = None
    """Keep this many likeliest tokens when sampling; 0 keeps all"""
    top_p: float | None = None
    """Keep the smallest set of tokens with this probability when sampling"""
    repetition_penalty: float | None = None
    """Above 1, tokens already written become less likely (Keskar et al. 2019)"""
    batch_size: int = 8
    """Prompts run together"""
    seed: int = 0
    """Of the sampling"""
    loop: Literal["auto", "fat5", "stock"] = "auto"
    """fat5 is our decoding loop, stock the generate of transformers; auto is ours for what it can do, else stock"""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            if given.get(name, 1) < 1:
                raise ConfigurationError(f"{given[name]} is below 1", where=name)
        for name in ("temperature", "repetition_penalty"):
            if not given.get(name, 1) > 0:
                raise ConfigurationError(f"{given[name]} is not above 0", where=name)
        if not 0 <= self.seed < 1 << 63:
            raise ConfigurationError(f"{self.seed} is not from 0 up to 2^63 - 1", where="seed")
        if given.get("top_k", 0) < 0:
            raise ConfigurationError(f"{self.top_k} is below 0", where="top_k", hint="0 keeps all")
        if not 0 < given.get("top_p", 1) <= 1:
            raise ConfigurationError(f"{self.top_p} is not in (0, 1]", where="top_p", hint="1 keeps all")
        if self.loop not in LOOPS:
            raise ConfigurationError(f"no loop {self.loop!r}", where="loop", hint=f"Choose one of {', '.join(LOOPS)}")

    def fields(self, model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
        """The fields of `GenerationConfig` to ask for: what is given here, and what every answer needs."""
        own = model.generation_config
        length = self.max_new_tokens or own.max_new_tokens or (own.max_length or 1 + DEFAULT_LENGTH) - 1
        asked = {
            "max_new_tokens": max(length, 1),
            "num_beams": self.num_beams,
            "do_sample": self.sample,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
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


def complete(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    mode: str = "auto",
    mode_token: str | None = None,
    decoding: Decoding | None = None,
) -> list[Completion]:
    """Completes each prompt; answers come in the order of the prompts.

    Args:
        model: a FAT5 or stock T5 model with `generate`.
        tokenizer: the one it was trained with.
        prompts: texts. Blanks are `___` or `<extra_id_0>`, in the order they stand.
        mode: "infill" fills blanks, "continue" goes on after the text, "text" gives the text as it is (translation and
            other fine-tuned tasks); "auto" is infill where a prompt has a blank, else continue.
        mode_token: put first; None takes [R] for infill and [S] for continue where the tokenizer has them, as those of
            other T5s do not; "" puts none.
        decoding: what the model's generation configuration says by default; greedy where it says nothing.

    Raises:
        ConfigurationError: an unknown mode or mode token, what the decoding loop asked for cannot do, or more than the
            memory holds.
        TokenizerError: more tokens than the model has rows for.
        DataError: an infill without a blank, or more blanks than sentinels.
    """
    decoding = decoding or Decoding()
    if mode not in MODES:
        raise ConfigurationError(f"no mode {mode!r}", where="mode", hint=f"Choose one of {', '.join(MODES)}")
    if mode_token and mode_token not in tokenizer.own_modes:
        known = f"Choose one of {', '.join(tokenizer.own_modes)}" if tokenizer.own_modes else "Its tokenizer has none"
        raise ConfigurationError(f"no mode token {mode_token!r}", where="mode_token", hint=known)
    if tokenizer.own_size > model.config.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.own_size:,} tokens, and the model only {model.config.vocab_size:,} rows for "
            "them",
            hint="They do not belong together; give the model its own tokenizer",
        )
    encoded = [_encode(tokenizer, prompt, mode, mode_token) for prompt in prompts]
    # Prompts of one length share a batch as far as may be: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i][1]), reverse=True)
    answers: dict[int, Completion] = {}
    device = next(model.parameters()).device
    how = decoding.fields(model, tokenizer)
    write, config = _writer(model, decoding.loop, how)
    _check_memory(model, min(decoding.batch_size, len(prompts)), config)
    ends = config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(decoding.seed)
        for batch in _batches(order, decoding.batch_size):
            input_ids, attention_mask = _pad([encoded[i][1] for i in batch], tokenizer.info.pad_id)
            try:
                with torch.inference_mode():
                    outputs = write(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), **how)
            except FAT5Error:
                raise
            except ValueError as error:  # transformers refuses values and combinations of its own
                raise ConfigurationError(
                    " ".join(str(error).split())[:300],
                    where="generation_config.json",
                    hint="Change it in the model's folder, or the keys you gave",
                ) from error
            for i, row in zip(batch, outputs.tolist()):
                row = list(takewhile(lambda token: token not in ends, row[1:]))
                answers[i] = _decode(tokenizer, prompts[i], encoded[i][0], row)
    return [answers[i] for i in range(len(prompts))]


def _writer(model: Any, loop: str, how: dict[str, Any]) -> tuple[Callable[..., torch.Tensor], Any]:
    """Our decoding loop's `generate` or the model's own, and the generation configuration that holds."""
    # Here, since it brings transformers along, which `fat5 generate --help` can do without.
    from fat5.generate.decoding import Decoder
    from fat5.generate.settings import left_to_stock, settings
    from fat5.generate.step import Models

    config = settings(model, how)
    serves = isinstance(model, Models) and not any(parameter.is_meta for parameter in model.parameters())
    beyond = left_to_stock(config)
    if loop == "fat5" and (beyond or not serves):
        what = f"obey {', '.join(beyond)}" if beyond else f"serve a {type(model).__name__}"
        raise ConfigurationError(f"our decoding loop does not {what}", where="loop", hint="Use --loop stock")
    if loop == "stock" or beyond or not serves:
        return model.generate, config
    return Decoder(model).generate, config


def _check_memory(model: Any, rows: int, config: Any) -> None:
    """Raises ConfigurationError where the answers of one batch are larger than the memory."""
    beams, length = config.num_beams or 1, config.max_new_tokens
    shape = model.config
    weight = next(model.parameters())
    cache = 2 * shape.num_decoder_layers * shape.num_heads * shape.d_kv * length * weight.dtype.itemsize
    # Logits, their softmax and two copies in float32; ids in int64, of open and finished beams.
    needed = rows * beams * (cache + 4 * 4 * shape.vocab_size + 3 * 8 * length)
    free = free_memory(weight.device)
    if free is not None and needed > free:
        raise ConfigurationError(
            f"{rows} x {beams} answers of up to {length:,} tokens need {needed / GIB:,.1f} GiB, and {free / GIB:,.1f} "
            "are free",
            where="max_new_tokens, num_beams",
            hint="Lower them, or batch_size",
        )


def _encode(tokenizer: Tokenizer, prompt: str, mode: str, mode_token: str | None) -> tuple[str, list[int]]:
    """(resolved mode, input ids): opening, mode token, text with sentinels, EOS, as the model saw them in training."""
    info = tokenizer.info
    has_blank = BLANK.search(prompt) is not None
    if mode == "auto":
        mode = "infill" if has_blank else "continue"
    ids = list(tokenizer.own_opening)
    if mode_token is None:
        mode_token = {"infill": "[R]", "continue": "[S]"}.get(mode, "")
        mode_token = mode_token if mode_token in tokenizer.own_modes else ""
    if mode_token:
        ids.append(info.mode_ids[mode_token])
    if mode == "text":
        return mode, [*ids, *tokenizer.encode(prompt, special=True), info.eos_id]
    if mode == "continue":
        return mode, [*ids, *tokenizer.encode(prompt.rstrip(" ")), info.sentinel_ids[0], info.eos_id]
    if not has_blank:
        raise DataError("nothing to fill in", where=repr(prompt[:60]), hint="Mark each blank with ___ or <extra_id_0>")
    pieces = BLANK.split(prompt)
    if len(pieces) - 1 > len(info.sentinel_ids):
        raise DataError(
            f"{len(pieces) - 1} blanks", where=repr(prompt[:60]), hint=f"The tokenizer has {len(info.sentinel_ids)}"
        )
    before = ""
    for index, piece in enumerate(pieces):
        # A token carries the space before it, so the space before a blank belongs to what fills it.
        piece = piece if index == len(pieces) - 1 else piece.rstrip(" ")
        if index:
            ids.append(info.sentinel_ids[index - 1])
            before = before or "a"  # a blank at the start is filled by some word
        ids += tokenizer.encode(piece, after=before)
        before = piece or before
    return mode, [*ids, info.eos_id]


def _decode(tokenizer: Tokenizer, prompt: str, mode: str, row: list[int]) -> Completion:
    info = tokenizer.info
    row = [token for token in row if token != info.pad_id]
    if mode == "text":
        text = tokenizer.decode(row, skip_special_tokens=True)
        return Completion(prompt, text.strip(), text.strip())
    if mode == "continue":
        pieces, spans = [prompt, ""], {0: [token for token in row if token not in set(info.sentinel_ids)]}
    else:
        pieces, spans = BLANK.split(prompt), _spans(row, info.sentinel_ids)
    text = ""
    before: list[int] = []
    fills: list[str] = []
    for index, piece in enumerate(pieces[:-1]):
        left = piece.rstrip(" ")
        before = tokenizer.encode(left) or before
        fill = tokenizer.decode(spans.get(index, []), skip_special_tokens=True, after=before)
        if left.endswith(("\n", "\t")) and not tokenizer.decode(before).endswith(("\n", "\t")):
            # SentencePiece has one kind of white space: the space that the span begins with is this line break.
            fill = fill.removeprefix(" ")
        text += left + fill
        fills.append(fill.strip())
        before = spans.get(index) or before
    return Completion(prompt, " … ".join(fills), text + pieces[-1])


def _spans(row: list[int], sentinel_ids: Sequence[int]) -> dict[int, list[int]]:
    """Blank number → its tokens, from `sentinel span sentinel span …`; the first answer for a blank counts."""
    number = {token: index for index, token in enumerate(sentinel_ids)}
    spans: dict[int, list[int]] = {}
    current: list[int] | None = None
    for token in row:
        if token in number:
            current = spans.setdefault(number[token], []) if number[token] not in spans else None
        elif current is not None:
            current.append(token)
    return spans


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) int64 ids padded on the right, and their mask."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def _batches(order: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
