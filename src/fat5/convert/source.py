"""The folder to convert: its configuration, kind of model and tokenizer, read by FAT5 and by stock transformers."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from fat5 import model as fat5_model
from fat5.data.tokenizer.loading import read_stock
from fat5.errors import CheckpointError, TokenizerError
from fat5.files import read_object
from fat5.model import FAT5Config, FAT5EncoderModel, quiet
from fat5.model.loading import readable, refuse_adapter
from fat5.train.checkpoint.store import model_folder

STOCK_PREFIX = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
KINDS = (
    "ForConditionalGeneration", "EncoderModel", "Model",
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip
# Files of every tokenizer; those of its class (spiece.model, vocab.json, …) are copied too.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
# A folder with any of these has a tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "vocab.txt")


@dataclass
class SourceModel:
    """A folder with a model.

    Args:
        model_type: t5, mt5, umt5, fat5 or flash_t5.
        kind: the class's name without its family, one of `KINDS`.
    """

    folder: Path
    model_type: str
    kind: str
    config: FAT5Config
    tokenizer: Path | None

    def load(self, encoder_only: bool = False) -> Any:
        """The model read by FAT5, in float32 on the CPU, in evaluation mode."""
        cls = FAT5EncoderModel if encoder_only else getattr(fat5_model, f"FAT5{self.kind}")
        with quiet():
            return cls.from_pretrained(self.folder, dtype=torch.float32).eval()


def read_source(path: str | Path, tokenizer: str | None = None, key: str = "tokenizer") -> SourceModel:
    """Describes a folder without reading its weights.

    Args:
        path: folder of a model, a checkpoint, or a run.
        tokenizer: its folder, if it is not the model's; `key` is the configuration key that gives it.

    Raises:
        CheckpointError: no folder, no configuration, another type of model.
        TokenizerError: a tokenizer that is damaged, or has more tokens than the model.
    """
    if not Path(path).exists():
        raise CheckpointError("does not exist", where=path, hint="Give the folder of a model or of a run")
    refuse_adapter(Path(path))
    if Path(path).is_dir() and any(Path(path).glob("*.safetensors")) and not (Path(path) / "config.json").is_file():
        raise CheckpointError("holds weights but no config.json", where=path, hint="Put the model's config.json there")
    folder = model_folder(Path(path))
    found = _read_object(folder / "config.json")
    kind = _kind(found, folder)
    if found.get("quantization_config"):
        raise CheckpointError(
            "holds quantised weights",
            where=folder,
            hint="Give the unquantised model; what is made of it can be quantised",
        )
    with readable(folder):
        config = FAT5Config.from_pretrained(folder)
    where = Path(tokenizer) if tokenizer else folder
    holds_one = any((where / name).is_file() for name in _TOKENIZERS)
    if holds_one:
        _check_size(where, config.vocab_size, key)
    elif tokenizer:
        what = "holds no tokenizer" if where.is_dir() else "no such folder"
        raise TokenizerError(what, where=tokenizer, hint="Give the folder that holds tokenizer.json")
    return SourceModel(folder, str(found.get("model_type", "t5")), kind, config, where if holds_one else None)


def load_stock(folder: Path, kind: str) -> Any:
    """The model read by its stock class of transformers, in float32 on the CPU, in evaluation mode."""
    family = _read_object(folder / "config.json").get("model_type")
    cls = getattr(transformers, f"{STOCK_PREFIX[str(family)]}{kind}")
    with quiet(), readable(folder):
        safe = any(folder.glob("*.safetensors"))
        return cls.from_pretrained(folder, dtype=torch.float32, use_safetensors=safe, weights_only=True).eval()


def load_stock_tokenizer(folder: Path) -> Any:
    """The tokenizer read by stock transformers; code in its folder never runs."""
    return read_stock(folder, transformers.PreTrainedTokenizerFast if is_named_unigram(folder) else None)


def is_named_unigram(folder: Path) -> bool:
    """Whether tokenizer_config.json names T5's tokenizer class, which is Unigram, for another kind of vocabulary.

    The first FAT5 wrote that class for its BPE.
    """
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if not all(file.is_file() for file in files):
        return False
    content, config = (_read_object(file) for file in files)
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    return config.get("tokenizer_class") in ("T5Tokenizer", "T5TokenizerFast") and kind not in (None, "Unigram")


def _kind(found: dict[str, Any], folder: Path) -> str:
    """The model's kind from `architectures`; without it, an encoder-decoder with a language-model head."""
    classes = found.get("architectures") or ["T5ForConditionalGeneration"]
    name = str(classes[0]) if isinstance(classes, list) else str(classes)
    kind = re.sub(r"^(FAT5|FlashT5|MT5|UMT5|T5)", "", name).replace("WithLMHeadModel", "ForConditionalGeneration")
    known_type = found.get("model_type", "t5") in (*STOCK_PREFIX, "fat5", "flash_t5")
    if known_type and kind not in KINDS:
        raise CheckpointError(
            f"holds a {name}", where=folder, hint=f"Kinds that are read: T5 {', '.join(KINDS)} and their families"
        )
    return kind


def _check_size(folder: Path, vocab_size: int, key: str) -> None:
    file = folder / "tokenizer.json"
    if file.is_file():
        content = _read_object(file)
        try:
            vocabulary = content["model"]["vocab"]
            ids = range(len(vocabulary)) if isinstance(vocabulary, list) else list(vocabulary.values())
            size = 1 + max([*ids, *(int(entry["id"]) for entry in content.get("added_tokens") or [])])
        except (KeyError, TypeError, ValueError) as error:
            raise TokenizerError("is damaged: it lacks its vocabulary", where=file, hint="Restore it") from error
    else:
        size = len(load_stock_tokenizer(folder))
    if size > vocab_size:
        raise TokenizerError(
            f"the tokenizer has {size:,} tokens, and the model only {vocab_size:,} rows for them",
            where=folder,
            hint=f"They do not belong together; give the model's own with --{key} DIR",
        )


def _read_object(path: Path) -> dict[str, Any]:
    return read_object(path, CheckpointError, "Restore it, or save it again")
