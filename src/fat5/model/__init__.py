"""The model: configuration, position encodings, layers, the encoder-decoder, loading and saving, generation."""

from transformers import AutoConfig, AutoModelForSeq2SeqLM

from fat5.model.configuration import POSITION_ENCODINGS, PRESETS, FAT5Config
from fat5.model.loading import load_model, quiet
from fat5.model.seq2seq import FAT5ForConditionalGeneration, PackedLMOutput

AutoConfig.register("fat5", FAT5Config, exist_ok=True)
AutoModelForSeq2SeqLM.register(FAT5Config, FAT5ForConditionalGeneration, exist_ok=True)

__all__ = [
    "POSITION_ENCODINGS",
    "PRESETS",
    "FAT5Config",
    "FAT5ForConditionalGeneration",
    "PackedLMOutput",
    "load_model",
    "quiet",
]
