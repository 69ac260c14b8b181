"""Conversion of a T5-family model to another format, verified. Imports no torch, so that --help answers at once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fat5.lazy import lazy

if TYPE_CHECKING:
    from fat5.convert.conversion import Conversion as Conversion
    from fat5.convert.conversion import convert as convert

__getattr__, __dir__ = lazy(__name__, __file__)


@dataclass
class ConvertConfig:
    """Convert a T5-family model to another format, and verify that the copy computes the same."""

    model: str = ""
    """Folder of a model (FAT5, T5, mT5, umT5, ByT5, flash_t5) or of a run (its model/ is taken)"""
    output_dir: str = ""
    """Folder to make; it must not exist yet"""
    to: Literal["hf", "fat5", "ctranslate2", "onnx"] = "hf"
    """hf for stock transformers (T5 positions), fat5 for any positions, ctranslate2, or onnx for the encoder"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights written; auto keeps the source's (ONNX is float32)"""
    quantization: Literal["int8", "int8_float16", "int8_bfloat16", "int16"] | None = None
    """Quantization of a CTranslate2 copy, after the float copy was verified"""
    tokenizer: str | None = None
    """Folder of the tokenizer, if it is not in the model's"""
    license: str | None = None
    """Licence for the model card (apache-2.0, cc-by-4.0, …); by default the one that the source's card names"""
    seed: int = 0
    """Seed of the random examples used for verification"""
