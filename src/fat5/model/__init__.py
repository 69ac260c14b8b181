"""The model: configuration, position encodings, layers, the encoder-decoder, heads, loading and saving."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from fat5.model.configuration import POSITION_ENCODINGS, PRESETS, FAT5Config
from fat5.model.heads import FAT5ForQuestionAnswering, FAT5ForSequenceClassification, FAT5ForTokenClassification
from fat5.model.loading import load_model, quiet
from fat5.model.seq2seq import FAT5ForConditionalGeneration, PackedLMOutput
from fat5.model.t5 import FAT5EncoderModel, FAT5Model

AutoConfig.register("fat5", FAT5Config, exist_ok=True)
AutoModel.register(FAT5Config, FAT5Model, exist_ok=True)
AutoModelForTextEncoding.register(FAT5Config, FAT5EncoderModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(FAT5Config, FAT5ForConditionalGeneration, exist_ok=True)
AutoModelForSequenceClassification.register(FAT5Config, FAT5ForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(FAT5Config, FAT5ForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(FAT5Config, FAT5ForQuestionAnswering, exist_ok=True)

__all__ = [
    "POSITION_ENCODINGS",
    "PRESETS",
    "FAT5Config",
    "FAT5EncoderModel",
    "FAT5ForConditionalGeneration",
    "FAT5ForQuestionAnswering",
    "FAT5ForSequenceClassification",
    "FAT5ForTokenClassification",
    "FAT5Model",
    "PackedLMOutput",
    "load_model",
    "quiet",
]
