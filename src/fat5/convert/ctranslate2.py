"""A T5 or mT5 as a CTranslate2 model, by CTranslate2's own converter with its misreadings of today's T5 corrected."""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fat5.convert.source import load_stock, load_stock_tokenizer
from fat5.convert.verification import Comparison
from fat5.errors import CheckpointError

GREEDY_TOKENS = 32
# Largest difference of log-probabilities, relative to the largest logit. Both sides compute in float32; the softmax
# adds one sum over the vocabulary.
SCORE_TOLERANCE = 2e-5
# If a logit is closer than this to our best, relative to the largest, either may win.
TIE = 1e-4


def convert_ctranslate2(
    plain: Path,
    target: Path,
    model: Any,
    examples: dict[str, Tensor],
    stored: torch.dtype,
    quantization: str | None,
    report: Any,
) -> None:
    """Writes and verifies; the report receives comparisons and notes.

    Args:
        plain: a folder with the model and its tokenizer, for stock transformers.
        target: folder to write into; its content is removed.
        model: the same model read by FAT5, in float32.
        stored: float dtype of the weights; quantization: their final type.

    Raises:
        CheckpointError: CTranslate2's tokens or scores differ from ours.
    """
    tokenizer = load_stock_tokenizer(plain)
    names = _names(tokenizer, model.config.vocab_size)
    # Only float weights show whether the conversion is right; quantised weights are different numbers.
    _write(plain, target, names, str(stored).removeprefix("torch."))
    _verify(target, model, examples, names, report)
    if quantization is None:
        return
    _write(plain, target, names, quantization)
    same, total, _ = _greedy(target, model, examples, names, "default")
    report.notes.append(f"quantised to {quantization}: {same} of {total} greedy tokens are those of the float model")


def _write(plain: Path, target: Path, names: list[str], quantization: str) -> None:
    from ctranslate2.converters.converter import Converter
    from ctranslate2.converters.transformers import T5Loader
    from ctranslate2.specs.model_spec import OPTIONAL

    class Loader(T5Loader):  # type: ignore[misc]
        def get_model_spec(self, model: Any) -> Any:
            spec = super().get_model_spec(model)
            # It reads tie_word_embeddings, which T5Config of transformers 5 always sets to true.
            config = model.config
            spec.decoder.scale_outputs = config.d_model**-0.5 if config.scale_decoder_outputs else OPTIONAL
            return spec

        def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
            # It names rows without a token <extra_id_N>, names that other rows already have.
            return names

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            super().set_config(config, model, tokenizer)
            # The tokenizer of a BERT-like T5 names no EOS; the model's configuration does.
            config.bos_token, config.eos_token = names[model.config.pad_token_id], names[model.config.eos_token_id]
            config.layer_norm_epsilon = model.config.layer_norm_epsilon

    class FromModel(Converter):  # type: ignore[misc]
        def _load(self) -> Any:
            with torch.no_grad():
                return Loader()(load_stock(plain, "ForConditionalGeneration"), load_stock_tokenizer(plain))

    FromModel().convert(str(target), quantization=quantization, force=True)
    gc.collect()


def _names(tokenizer: Any, vocab_size: int) -> list[str]:
    """The token of each row of the embeddings; rows without one get a name that no text contains."""
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    return [known.get(index, f"<unused_{index}>") for index in range(vocab_size)]


def _verify(folder: Path, model: Any, examples: dict[str, Tensor], names: list[str], report: Any) -> None:
    what = "log-probabilities of random targets (CTranslate2 on the copy, FAT5 on the source)"
    scores = Comparison(what, _scores(folder, model, examples, names), SCORE_TOLERANCE)
    report.compared.append(scores.require(report.source))
    same, total, wrong = _greedy(folder, model, examples, names, "float32")
    if wrong:
        raise CheckpointError(
            f"CTranslate2 writes other tokens than the source: {wrong}; nothing was written", where=report.source
        )
    rest = "" if same == total else ", the rest in ties with our best"
    report.notes.append(f"greedy decoding: {same} of {total} tokens equal{rest}")


def _scores(folder: Path, model: Any, examples: dict[str, Tensor], names: list[str]) -> float:
    """The largest difference of the targets' log-probabilities, relative to the largest logit."""
    import ctranslate2

    config = model.config
    # CTranslate2 also scores EOS behind the targets.
    decoder_input_ids = examples["decoder_input_ids"]
    labels = torch.cat([decoder_input_ids[:, 1:], torch.full((len(decoder_input_ids), 1), config.eos_token_id)], 1)
    with torch.no_grad():
        logits = model(**examples, use_cache=False).logits
    want = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    translator = ctranslate2.Translator(str(folder), device="cpu", compute_type="float32")
    results = translator.score_batch(
        _sources(examples, names), [[names[index] for index in row] for row in labels[:, :-1].tolist()]
    )
    got = torch.tensor([result.log_probs for result in results])
    return float((got - want).abs().max() / logits.abs().max()) if got.shape == want.shape else float("nan")


@torch.no_grad()
def _greedy(
    folder: Path, model: Any, examples: dict[str, Tensor], names: list[str], compute_type: str
) -> tuple[int, int, str]:
    """How many of CTranslate2's greedy tokens are our best behind the same prefix, how many there are, and the first
    fault that is no tie, in words.
    """
    import ctranslate2

    translator = ctranslate2.Translator(str(folder), device="cpu", compute_type=compute_type)
    results = translator.translate_batch(
        _sources(examples, names), beam_size=1, max_decoding_length=GREEDY_TOKENS, return_end_token=True
    )
    number = {name: index for index, name in enumerate(names)}
    same, total, wrong = 0, 0, ""
    for i, result in enumerate(results):
        tokens = [number[name] for name in result.hypotheses[0]]
        logits = model(
            examples["input_ids"][i : i + 1], examples["attention_mask"][i : i + 1],
            torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]]), use_cache=False,
        ).logits[0]  # fmt: skip
        behind = (logits.amax(dim=-1) - logits[range(len(tokens)), tokens]) / logits.abs().max()
        same, total = same + int((behind == 0).sum()), total + len(tokens)
        eos = model.config.eos_token_id
        end = tokens.index(eos) + 1 if eos in tokens else GREEDY_TOKENS
        if len(tokens) != end:
            wrong = wrong or f"example {i} ends after {len(tokens)} tokens, not {end}"
        for place in (behind > TIE).nonzero()[:1, 0].tolist():
            best = names[int(logits[place].argmax())]
            wrong = wrong or f"token {place} of example {i} is {names[tokens[place]]!r}, not {best!r}"
    return same, total, wrong


def _sources(examples: dict[str, Tensor], names: list[str]) -> list[list[str]]:
    return [
        [names[index] for index in ids[mask.bool()].tolist()]
        for ids, mask in zip(examples["input_ids"], examples["attention_mask"])
    ]
