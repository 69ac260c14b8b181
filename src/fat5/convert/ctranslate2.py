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
# If our two best logits are closer than this, relative to the largest, either may win.
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
    """Writes and verifies.

    Args:
        plain: a folder with the model and its tokenizer, for stock transformers.
        target: folder to write into; its content is removed.
        model: the same model read by FAT5, in float32.
        examples: inputs for the verification.
        stored: float dtype of the weights; quantization: their final type, or None.
        report: receives comparisons and notes.

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
    same, total = _greedy(target, model, examples, names, "default")[:2]
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
    rest = "" if same == total else ", the rest behind a tie of our two best"
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


def _greedy(
    folder: Path, model: Any, examples: dict[str, Tensor], names: list[str], compute_type: str
) -> tuple[int, int, str]:
    """Number of equal tokens, number of tokens, and the first difference that is no tie, in words."""
    import ctranslate2

    want, gaps = _our_greedy(model, examples)
    translator = ctranslate2.Translator(str(folder), device="cpu", compute_type=compute_type)
    results = translator.translate_batch(
        _sources(examples, names), beam_size=1, max_decoding_length=GREEDY_TOKENS, return_end_token=True
    )
    same, wrong = 0, ""
    for number, (result, row, gap) in enumerate(zip(results, want, gaps)):
        got, expected = result.hypotheses[0], [names[index] for index in row]
        equal = next((i for i, pair in enumerate(zip(got, expected)) if pair[0] != pair[1]), len(expected))
        same += min(equal, len(got))
        if (equal < len(expected) and gap[equal] > TIE) or len(got) < equal:
            wrong = wrong or f"token {equal} of example {number} is {got[equal : equal + 1]}, not {expected[equal]!r}"
    return same, sum(map(len, want)), wrong


@torch.no_grad()
def _our_greedy(model: Any, examples: dict[str, Tensor]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of each example up to EOS, and the lead of each over the second best, relative to the largest
    logit.
    """
    config = model.config
    mask = examples["attention_mask"]
    memory = model.get_encoder()(examples["input_ids"], attention_mask=mask)
    ids = torch.full((len(mask), 1), config.decoder_start_token_id)
    gaps = []
    for _ in range(GREEDY_TOKENS):
        logits = model(encoder_outputs=memory, attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits[
            :, -1
        ]
        best = logits.topk(2, dim=-1)
        gaps.append((best.values[:, 0] - best.values[:, 1]) / logits.abs().max())
        ids = torch.cat([ids, best.indices[:, :1]], dim=1)
    rows, ahead = ids[:, 1:].tolist(), torch.stack(gaps, dim=1).tolist()
    ends = [row.index(config.eos_token_id) + 1 if config.eos_token_id in row else len(row) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)], [row[:end] for row, end in zip(ahead, ends)]


def _sources(examples: dict[str, Tensor], names: list[str]) -> list[list[str]]:
    return [
        [names[index] for index in ids[mask.bool()].tolist()]
        for ids, mask in zip(examples["input_ids"], examples["attention_mask"])
    ]
