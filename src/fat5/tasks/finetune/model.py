"""The model of a task and its tokenizer: where they are, and the configuration with the task's labels."""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fat5.data import Tokenizer
from fat5.errors import ConfigurationError
from fat5.model import FAT5Config, quiet
from fat5.model.layers import HeadProjection
from fat5.tasks.finetune.config import FinetuneConfig
from fat5.tasks.initial import find_tokenizer
from fat5.train.checkpoint.state import unique_weights
from fat5.train.checkpoint.store import model_folder

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.model", "vocab.*",
    "merges.txt",
)  # fmt: skip


def base_and_tokenizer(config: FinetuneConfig) -> tuple[Path | None, Path]:
    """The folder of the weights (None for random ones) and that of the tokenizer.

    Raises:
        CheckpointError: no such model. TokenizerError: no tokenizer with it.
    """
    base = None if config.model == "none" else model_folder(Path(config.model))
    if config.tokenizer is not None:
        return base, Path(config.tokenizer)
    assert base is not None, "resolved() asks for a tokenizer"
    if any((base / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model")):
        return base, base
    return base, find_tokenizer(base)


def copy_tokenizer(tokenizer: Tokenizer, source: Path, target: Path) -> None:
    """Copies a tokenizer's files alone from a folder that may hold a model too; saves one that came from the hub."""
    found = [file for pattern in TOKENIZER_FILES for file in sorted(source.glob(pattern))] if source.is_dir() else []
    if not any(file.name == "tokenizer.json" for file in found):
        tokenizer.save(target)
    for file in found:
        shutil.copyfile(file, target / file.name)


def configure_model(
    config: FinetuneConfig, form: Any, base: Path | None, tokenizer: Tokenizer, where: Path
) -> FAT5Config:
    """The configuration of the model that is trained, with its labels.

    Raises:
        ConfigurationError: as `check_head`. TokenizerError: it has more tokens than the model.
    """
    info = tokenizer.info
    if base is not None or (where / "config.json").is_file():
        with quiet():
            found = FAT5Config.from_pretrained(base or where)
        if base is not None:
            check_head(found, base, config, form)
    else:
        found = FAT5Config.preset(
            config.preset, vocab_size=info.vocab_size, pad_token_id=info.pad_id, eos_token_id=info.eos_id,
            decoder_start_token_id=info.pad_id,
        )  # fmt: skip
    tokenizer.check_rows(found.vocab_size, where)
    if form.label_names:
        found.id2label = dict(enumerate(form.label_names))
        found.label2id = {name: index for index, name in enumerate(form.label_names)}
    elif form.kind in ("regression", "answers"):
        found.num_labels = 1 if form.kind == "regression" else 2
    if form.kind == "answers":
        found.task_specific_params = {"question-answering": {"handle_impossible_answer": form.may_be_missing}}
    if form.kind in ("classification", "regression"):
        found.problem_type = "regression" if form.kind == "regression" else "single_label_classification"
    found.head_form = None if form.kind in ("text", "entities") else config.head
    if config.dropout is not None:
        found.dropout_rate = found.classifier_dropout = config.dropout
    return found


def check_head(found: FAT5Config, base: Path, config: FinetuneConfig, form: Any) -> None:
    """Refuses a model whose head was made for something else, or that lacks the decoder of the task.

    Raises:
        ConfigurationError: the head has another number of labels, or there is no decoder.
    """
    own = (found.architectures or [""])[0]
    headed = own.endswith(("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"))
    encoder_only = own.startswith("FAT5") and headed and found.head_form != "encoder-decoder"
    if (encoder_only or own.endswith("EncoderModel")) and (form.kind == "text" or config.head == "encoder-decoder"):
        what = config.task if form.kind == "text" else "head encoder-decoder"
        raise ConfigurationError(
            f"{own} has no decoder, which {what} needs", where=base, hint="Give the model that it was made from"
        )
    wanted = {"regression": 1, "answers": 2}.get(form.kind, len(form.label_names))
    if own.endswith(form.model) and headed and found.num_labels != wanted:
        raise ConfigurationError(
            f"its head gives {found.num_labels:,} numbers, and these examples need {wanted:,}",
            where=base,
            hint="Give the model that it was made from, or examples with its labels",
        )


def weights_sha256(model: Any) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for _, weight in unique_weights(model):
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def widen_new_head(model: Any, missing: Iterable[str]) -> None:
    """Makes a new head read states of size 1, as a random model's are.

    Pretraining shrinks the weight of a stack's last norm (to 0.36 in the demo), and with it the states: a head of the
    usual size learns as much slower (docs/lab-log.md, 2026-11-28).

    Args:
        missing: names of the weights that the checkpoint lacks, which are random.
    """
    for name, layer in model.named_modules():
        if (
            isinstance(layer, HeadProjection)
            and layer.in_features == model.config.d_model
            and f"{name}.weight" in missing
        ):
            stack = model.get_decoder() if model.config.head_form == "encoder-decoder" else model.get_encoder()
            layer.weight /= stack.final_layer_norm.weight.square().mean().sqrt()
            return
