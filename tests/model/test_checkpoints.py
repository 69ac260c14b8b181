"""Saving and loading: complete, safe, and every position encoding comes back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packed import TINY, VARIANTS, batch, model
from transformers import AutoModelForSeq2SeqLM

from fat5.errors import CheckpointError, ConfigurationError
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


@pytest.fixture
def saved(tmp_path):
    model().save_pretrained(tmp_path)
    return tmp_path


def change(folder, function) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_tensor(saved):
    change(saved, lambda tensors: tensors.pop("decoder.block.1.layer.1.EncDecAttention.k.weight"))
    with pytest.raises(CheckpointError, match=r"decoder\.block\.1\.layer\.1\.EncDecAttention\.k\.weight"):
        load_model(saved)


def test_misshapen_tensor(saved):
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    change(saved, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    with pytest.raises(CheckpointError, match=r"DenseReluDense\.wo\.weight has shape \(3, 3\)"):
        load_model(saved)


def test_pickle_is_refused(saved):
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt.*refused"):
        load_model(saved)


def test_empty_folder_and_other_family(saved, tmp_path_factory):
    with pytest.raises(CheckpointError):
        load_model(tmp_path_factory.mktemp("empty"))
    config = json.loads((saved / "config.json").read_text()) | {"model_type": "bert"}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="bert"):
        load_model(saved)


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
