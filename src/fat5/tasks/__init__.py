"""Tasks: what a trained model is used for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fat5.tasks.complete import Completion, Decoding, complete

if TYPE_CHECKING:
    from fat5.tasks.conversion import Conversion, ConvertConfig, convert

__all__ = ["Completion", "Conversion", "ConvertConfig", "Decoding", "complete", "convert"]


def __getattr__(name: str) -> Any:
    # When first used, since it brings transformers along, which completing can do without.
    if name in ("Conversion", "ConvertConfig", "convert"):
        return getattr(import_module("fat5.tasks.conversion"), name)
    raise AttributeError(f"module 'fat5.tasks' has no attribute {name!r}")
