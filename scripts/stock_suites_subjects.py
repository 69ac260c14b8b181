"""Tiny models of each family for the common suite in transformers' sources. `stock_suites.py` copies this file beside
that suite, where `tests` is the package of the sources.
"""

import unittest
from typing import Any

import transformers
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor


class Subject:
    """What the common suite asks of a model: a small configuration and a batch.

    Args:
        config_class: of the family, in transformers.
        decodes: whether the batch has a decoder's side.
    """

    batch_size, seq_length, encoder_seq_length, decoder_seq_length = 13, 7, 7, 7
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, config_class: str, decodes: bool) -> None:
        self.config_class, self.decodes = config_class, decodes
        self.is_training = decodes  # an encoder alone has no loss

    def get_config(self) -> Any:
        return getattr(transformers, self.config_class)(
            vocab_size=self.vocab_size, d_model=self.hidden_size, d_ff=37, num_layers=self.num_hidden_layers,
            d_kv=self.hidden_size // self.num_attention_heads, num_heads=self.num_attention_heads,
            relative_attention_num_buckets=8, dropout_rate=0.1, initializer_factor=0.002, eos_token_id=1,
            pad_token_id=0, bos_token_id=0, decoder_start_token_id=0, is_encoder_decoder=self.decodes,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """Masks hide any tokens, so that some queries see no key."""
        shape = [self.batch_size, self.seq_length]
        inputs = ids_tensor(shape, self.vocab_size).clamp(2)
        inputs[:, -1] = 1  # one EOS, for the classifier
        batch: dict[str, Any] = {"input_ids": inputs, "attention_mask": ids_tensor(shape, 2)}
        if self.decodes:
            batch |= {
                "decoder_input_ids": ids_tensor(shape, self.vocab_size).clamp(2),
                "decoder_attention_mask": ids_tensor(shape, 2),
            }
        return self.get_config(), batch


def suites(family: str) -> tuple[type, type]:
    """The suites of a family's models with a decoder, and without one."""

    def suite(name: str, decodes: bool, kinds: list[str]) -> type:
        def prepare(self: Any) -> None:
            self.model_tester = Subject(f"{family}Config", decodes)

        def embeddings(self: Any) -> None:
            """Of all but the classifier, which in transformers takes no embeddings."""
            self.all_model_classes = tuple(c for c in classes if not c.__name__.endswith("SequenceClassification"))
            ModelTesterMixin.test_inputs_embeds(self)

        mixins = (ModelTesterMixin, GenerationTesterMixin) if decodes else (ModelTesterMixin,)
        classes = tuple(getattr(transformers, f"{family}{kind}") for kind in kinds)
        return type(name, (*mixins, unittest.TestCase), {
            "all_model_classes": classes, "is_encoder_decoder": decodes, "setUp": prepare, "__module__": __name__,
            "model_split_percents": [0.5, 0.8, 0.9], "test_resize_embeddings": decodes,
            "test_inputs_embeds": embeddings,
        })  # fmt: skip

    decoders = ["Model", "ForConditionalGeneration", "ForSequenceClassification", "ForQuestionAnswering"]
    return suite(f"{family}ModelTest", True, decoders), suite(
        f"{family}EncoderTest", False, ["EncoderModel", "ForTokenClassification"]
    )


T5ModelTest, T5EncoderTest = suites("T5")
MT5ModelTest, MT5EncoderTest = suites("MT5")
UMT5ModelTest, UMT5EncoderTest = suites("UMT5")
