"""Saving and loading: every position encoding comes back. Damaged folders: tests/cli/test_bad_models.py."""

import json

import pytest
from safetensors.torch import load_file
from test_packed import TINY, VARIANTS, batch, model
from transformers import AutoModelForSeq2SeqLM

from fat5.errors import ConfigurationError
from fat5.model import FAT5Config, FAT5ForConditionalGeneration, load_model


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, tmp_path):
    net, data = model(**VARIANTS[variant], z_loss=0.5).eval(), batch()
    net.save_pretrained(tmp_path)
    family = "t5" if variant == "t5" else "fat5"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    again = load_model(tmp_path)
    assert again.config.z_loss == 0.5
    assert again(**data).loss == net(**data).loss
    if family == "fat5":
        assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), FAT5ForConditionalGeneration)


def test_tied_stays_tied(tmp_path):
    net = model(tie_word_embeddings=True)
    net.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.lm_head.weight is again.shared.weight is again.encoder.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert TINY["vocab_size"] == again.config.vocab_size


@pytest.mark.parametrize(
    "bad",
    [{"z_loss": "x"}, {"z_loss": float("nan")}, {"z_loss": float("inf")}, {"label_smoothing": [1]},
     {"max_positions": None}, {"fire_width": 1.5}, {"rotary_base": "x"}, {"rotary_scaling": float("nan")},
     {"attention_dropout_rate": True}],
    ids=str,
)  # fmt: skip
def test_a_key_of_ours_that_cannot_be_is_named(bad):
    with pytest.raises(ConfigurationError, match=next(iter(bad)).split("_")[0]):
        FAT5Config(**bad)
    assert FAT5Config(attention_dropout_rate=None, z_loss=1).attention_dropout == FAT5Config().dropout_rate
