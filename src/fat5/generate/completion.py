"""Prompts to completions: fill the blanks of a text, continue it, or pass it to the model as it is."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fat5.data import Tokenizer
from fat5.errors import ConfigurationError, DataError, FAT5Error
from fat5.generate.config import Decoding
from fat5.generate.decoding import Decoder
from fat5.generate.replay import pays
from fat5.generate.settings import left_to_stock, settings
from fat5.generate.step import Models
from fat5.machine import GIB, free_memory

# A blank is a sentinel or at least three underscores.
BLANK = re.compile(r"<extra_id_\d+>|_{3,}")
MODES = ("auto", "infill", "continue", "text")


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        completion: the model's own text: the spans of an infill (joined by " … "), the continuation, or the output.
        text: the prompt with its blanks filled or its continuation appended; in mode "text" only the output.
    """

    prompt: str
    completion: str
    text: str


def complete(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    mode: str = "auto",
    mode_token: str | None = None,
    prefix: str | None = None,
    decoding: Decoding | None = None,
) -> list[Completion]:
    """Completes each prompt; answers come in the order of the prompts.

    Args:
        model: a FAT5 or stock T5 model with `generate`.
        prompts: texts. Blanks are `___` or `<extra_id_0>`, in order.
        mode: "infill" fills blanks, "continue" continues the text, "text" passes the text behind the prefix
            (translation and other fine-tuned tasks); "auto" is text for a model that was fine-tuned or with a prefix,
            infill for a prompt with a blank, else continue.
        mode_token: the first token of the input; None takes [R] for infill and [S] for continue if the tokenizer has
            them (tokenizers of other T5s do not); "" puts none.
        prefix: stands before a text; None takes that of the model's configuration, which `fat5 finetune` writes.
        decoding: None takes the model's generation configuration, or greedy decoding without one.

    Raises:
        ConfigurationError: an unknown mode or mode token, a prefix in another mode than text, a setting that the loop
            cannot obey, too little memory.
        TokenizerError: a tokenizer with more tokens than the model has rows for.
        DataError: an infill without a blank, or more blanks than sentinels.
    """
    decoding = decoding or Decoding()
    if mode not in MODES:
        raise ConfigurationError(f"no mode {mode!r}", where="mode", hint=f"Choose one of {', '.join(MODES)}")
    if mode_token and mode_token not in tokenizer.own_modes:
        known = f"Choose one of {', '.join(tokenizer.own_modes)}" if tokenizer.own_modes else "Its tokenizer has none"
        raise ConfigurationError(f"no mode token {mode_token!r}", where="mode_token", hint=known)
    tokenizer.check_rows(model.config.vocab_size)
    learned = getattr(model.config, "prefix", None)
    if not isinstance(learned, str | None):
        raise ConfigurationError(f"is {learned!r:.60}, and no text", where="prefix in config.json", hint="Remove it")
    if prefix is not None and mode not in ("auto", "text"):
        raise ConfigurationError(f"has no place in mode {mode}", where="prefix", hint="Remove it, or say mode text")
    if mode == "auto" and (learned is not None or prefix is not None):
        mode = "text"
    prefix = (learned or "") if prefix is None else prefix
    encoded = [_encode(tokenizer, prompt, mode, mode_token, prefix) for prompt in prompts]
    # Prompts of similar length share a batch, for less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i][1]), reverse=True)
    answers: dict[int, Completion] = {}
    device = next(model.parameters()).device
    how = decoding.fields(model, tokenizer)
    replays = decoding.cuda_graphs and pays(device, -(-len(order) // decoding.batch_size))
    write, config = _writer(model, decoding.loop, how, replays)
    _check_memory(model, min(decoding.batch_size, len(prompts)), config)
    ends = config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(decoding.seed)
        for start in range(0, len(order), decoding.batch_size):
            batch = order[start : start + decoding.batch_size]
            texts = [torch.tensor(encoded[i][1], device=device) for i in batch]
            input_ids = pad_sequence(texts, batch_first=True, padding_value=tokenizer.info.pad_id)
            attention_mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
            try:
                with torch.inference_mode():
                    outputs = write(input_ids=input_ids, attention_mask=attention_mask, **how)
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


def _writer(model: Any, loop: str, how: dict[str, Any], replays: bool) -> tuple[Callable[..., torch.Tensor], Any]:
    """The `generate` of our decoding loop or the model's own, and the generation configuration for it."""
    config = settings(model, how)
    serves = isinstance(model, Models) and not any(parameter.is_meta for parameter in model.parameters())
    beyond = left_to_stock(config)
    if loop == "fat5" and (beyond or not serves):
        what = f"obey {', '.join(beyond)}" if beyond else f"serve a {type(model).__name__}"
        raise ConfigurationError(f"our decoding loop does not {what}", where="loop", hint="Use --loop stock")
    if loop == "stock" or beyond or not serves:
        return model.generate, config
    return partial(Decoder(model).generate, cuda_graph=replays), config


def _check_memory(model: Any, rows: int, config: Any) -> None:
    """Raises ConfigurationError if the answers of one batch do not fit into memory."""
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


def _encode(tokenizer: Tokenizer, prompt: str, mode: str, mode_token: str | None, prefix: str) -> tuple[str, list[int]]:
    """(resolved mode, input ids): opening, mode token, text with sentinels, EOS, as in training."""
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
        return mode, [*ids, *tokenizer.encode(prefix + prompt.removeprefix(prefix), special=True), info.eos_id]
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
        # A token includes the space before it, so the space before a blank belongs to its filling.
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
            # SentencePiece has one kind of white space, so the span begins with a space for this line break.
            fill = fill.removeprefix(" ")
        text += left + fill
        fills.append(fill.strip())
        before = spans.get(index) or before
    return Completion(prompt, " … ".join(fills), text + pieces[-1])


def _spans(row: list[int], sentinel_ids: Sequence[int]) -> dict[int, list[int]]:
    """Blank number → its tokens, from `sentinel span sentinel span …`; the first span for a blank counts."""
    number = {token: index for index, token in enumerate(sentinel_ids)}
    spans: dict[int, list[int]] = {}
    current: list[int] | None = None
    for token in row:
        if token in number:
            current = spans.setdefault(number[token], []) if number[token] not in spans else None
        elif current is not None:
            current.append(token)
    return spans
