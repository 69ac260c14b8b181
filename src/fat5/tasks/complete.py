"""Prompts in, completions out: fill the blanks of a text, continue it, or hand it to the model as it is."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fat5.data import Tokenizer
from fat5.errors import ConfigurationError, DataError, TokenizerError

# A blank is written as the sentinel itself or as three underscores, whichever the user finds easier to type.
BLANK = re.compile(r"<extra_id_\d+>|_{3,}")
MODES = ("auto", "infill", "continue", "text")
LOOPS = ("auto", "fat5", "stock")


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
    """How an answer is written, token by token."""

    max_new_tokens: int = 64
    """Limit of one answer"""
    num_beams: int = 1
    """Above 1, beam search"""
    sample: bool = False
    """Draw tokens rather than take the likeliest"""
    temperature: float = 1.0
    """Flattens (above 1) or sharpens the distribution when sampling"""
    top_k: int = 50
    """Keep this many likeliest tokens when sampling; 0 keeps all"""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this probability when sampling"""
    repetition_penalty: float = 1.0
    """Above 1, tokens already written become less likely (Keskar et al. 2019)"""
    batch_size: int = 8
    """Prompts run together"""
    seed: int = 0
    """Of the sampling"""
    loop: Literal["auto", "fat5", "stock"] = "auto"
    """fat5 is our decoding loop, stock the generate of transformers; auto is ours wherever it serves"""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{getattr(self, name)} is below 1", where=name)
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{getattr(self, name)} is not above 0", where=name)
        if not 0 <= self.seed < 1 << 63:
            raise ConfigurationError(f"{self.seed} is not from 0 up to 2^63 - 1", where="seed")
        if self.top_k < 0:
            raise ConfigurationError(f"{self.top_k} is below 0", where="top_k", hint="0 keeps all")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"{self.top_p} is not in (0, 1]", where="top_p", hint="1 keeps all")
        if self.loop not in LOOPS:
            raise ConfigurationError(f"no loop {self.loop!r}", where="loop", hint=f"Choose one of {', '.join(LOOPS)}")
        if self.loop == "fat5" and self.num_beams > 1 and self.sample:
            raise ConfigurationError(
                "our decoding loop does not sample among beams",
                where="loop",
                hint="Use --loop stock, or one of the two",
            )

    def strategy(self) -> dict[str, Any]:
        """Keyword arguments of stock `generate` and of ours."""
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.sample,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.sample:
            chosen |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return chosen


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
        decoding: greedy by default.

    Raises:
        ConfigurationError: an unknown mode or mode token, or a model that our decoding loop, asked for, cannot serve.
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
    write = _writer(model, decoding)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(decoding.seed)
        for batch in _batches(order, decoding.batch_size):
            input_ids, attention_mask = _pad([encoded[i][1] for i in batch], tokenizer.info.pad_id)
            with torch.inference_mode():
                outputs = write(
                    input_ids=input_ids.to(device),
                    attention_mask=attention_mask.to(device),
                    eos_token_id=tokenizer.info.eos_id,
                    pad_token_id=tokenizer.info.pad_id,
                    **decoding.strategy(),
                )
            for i, row in zip(batch, outputs.tolist()):
                answers[i] = _decode(tokenizer, prompts[i], encoded[i][0], row[1:])
    return [answers[i] for i in range(len(prompts))]


def _writer(model: Any, decoding: Decoding) -> Callable[..., torch.Tensor]:
    """Our decoding loop's `generate` or the model's own."""
    # Here, since it brings transformers along, which `fat5 generate --help` can do without.
    from fat5.model.decoding import Decoder
    from fat5.model.decoding_step import Models

    serves = isinstance(model, Models) and not any(parameter.is_meta for parameter in model.parameters())
    if decoding.loop == "fat5" and not serves:
        raise ConfigurationError(
            f"our decoding loop does not serve a {type(model).__name__}", where="loop", hint="Use --loop stock"
        )
    if decoding.loop == "stock" or not serves or (decoding.sample and decoding.num_beams > 1):
        return model.generate  # type: ignore[no-any-return]
    return Decoder(model).generate


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
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        # A token carries the space before it, so the space before a blank belongs to what fills it.
        ids += tokenizer.encode(piece if last else piece.rstrip(" "))
        if not last:
            ids.append(info.sentinel_ids[index])
    return mode, [*ids, info.eos_id]


def _decode(tokenizer: Tokenizer, prompt: str, mode: str, row: list[int]) -> Completion:
    info = tokenizer.info
    if info.eos_id in row:
        row = row[: row.index(info.eos_id)]
    row = [token for token in row if token != info.pad_id]
    if mode == "text":
        text = tokenizer.decode(row, skip_special_tokens=True)
        return Completion(prompt, text.strip(), text.strip())
    if mode == "continue":
        pieces, spans = [prompt, ""], {0: [token for token in row if token not in set(info.sentinel_ids)]}
    else:
        pieces, spans = BLANK.split(prompt), _spans(row, info.sentinel_ids)
    text, before, fills = "", [], []
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
