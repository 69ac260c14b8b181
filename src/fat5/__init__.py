"""FAT5 (Flash Attention T5): pretrain, run and convert T5-family encoder-decoder models, fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fat5.registration import register_with_transformers

__version__ = "0.1.0"

# Each name is imported when first used, so that `import fat5` stays light and needs neither a GPU nor Triton.
_HOMES = {
    "FAT5Config": "fat5.model",
    "FAT5EncoderModel": "fat5.model",
    "FAT5ForConditionalGeneration": "fat5.model",
    "FAT5ForQuestionAnswering": "fat5.model",
    "FAT5ForSequenceClassification": "fat5.model",
    "FAT5ForTokenClassification": "fat5.model",
    "accelerate": "fat5.model",
}

if TYPE_CHECKING:
    from fat5 import data, errors, model, ops, optim, train
    from fat5.model import (
        FAT5Config,
        FAT5EncoderModel,
        FAT5ForConditionalGeneration,
        FAT5ForQuestionAnswering,
        FAT5ForSequenceClassification,
        FAT5ForTokenClassification,
        accelerate,
    )

__all__ = [
    "FAT5Config",
    "FAT5EncoderModel",
    "FAT5ForConditionalGeneration",
    "FAT5ForQuestionAnswering",
    "FAT5ForSequenceClassification",
    "FAT5ForTokenClassification",
    "accelerate",
    "data",
    "errors",
    "model",
    "ops",
    "optim",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("data", "errors", "model", "ops", "optim", "train"):
        return import_module(f"fat5.{name}")
    raise AttributeError(f"module 'fat5' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


register_with_transformers()
