"""Folders to convert: stock models of every family, FAT5's, the first FAT5's; and the calls that every test makes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import stock as models
from fat5.convert import ConvertConfig, conversion, convert
from fat5.errors import FAT5Error

SIZES: dict[str, Any] = models.SIZES | {"vocab_size": 1024, "num_layers": 2, "num_decoder_layers": 2}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def stock(family: str) -> Any:
    """A stock model with weights that are all random: norms and output projection too."""
    sizes = SIZES | ({"vocab_size": 384, "num_layers": 4} if family == "ByT5" else {})
    model = (models.FAMILIES | {"encoder": models.encoder})[family](**sizes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
    return model.eval()


FAT5_POSITIONS = ("alibi", "rope", "fire", "absolute", "none")
FLASH_NAMES = (
    ("layer.0.SelfAttention.relative", "self_attention_layer.self_attention.pe_encoding.relative"),
    *((f"layer.0.SelfAttention.{x}.", f"self_attention_layer.self_attention.W{x}.") for x in "qkv"),
    ("layer.0.SelfAttention.o.", "self_attention_layer.self_attention.o."),
    ("layer.0.layer_norm.", "self_attention_layer.layer_norm."),
    *((f"layer.1.EncDecAttention.{x}.", f"cross_attention_layer.cross_attention.W{x}.") for x in "qkv"),
    ("layer.1.EncDecAttention.o.", "cross_attention_layer.cross_attention.o."),
)


def as_flash_t5(model: Any, target: Path) -> None:
    """The same weights as the first FAT5 wrote them."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = name
        for new_part, old_part in FLASH_NAMES:
            old = old.replace(new_part, old_part)
        if "DenseReluDense" in old or (".layer_norm." in old and ".layer." in old):
            side = "encoder" if old.startswith("encoder") else "decoder"
            feed_forward = "layer.1." if side == "encoder" else "layer.2."
            old = old.replace("layer.1.layer_norm.", "cross_attention_layer.layer_norm.") if side == "decoder" else old
            old = old.replace(f"{feed_forward}layer_norm.", "ff_layer.layer_norm.")
            old = old.replace(f"{feed_forward}DenseReluDense.wo.", "ff_layer.wo.")
            old = old.replace(f"{feed_forward}DenseReluDense.", "ff_layer.act.")
        if "embed_tokens" not in old:
            tensors[old] = tensor.contiguous()
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    keys = SIZES | {"use_glu_mlp": True, "use_gelu_act": True, "position_encoding_type": "t5", "attention_scale": 1.0}
    # As transformers 4 derived them, whatever the model was.
    keys |= {"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}
    content = keys | {"model_type": "flash_t5", "architectures": ["FlashT5ForConditionalGeneration"]}
    (target / "config.json").write_text(json.dumps(content | {"eos_token_id": 1, "pad_token_id": 0}))


def run(source: Path, to: str, **options: Any) -> conversion.Conversion:
    return convert(ConvertConfig(model=str(source), output_dir=str(source.parent / "made"), to=to, **options))


def change(source: Path, name: str, function: Any) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[name] = function(tensors[name])
    save_file({k: v.contiguous() for k, v in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"})


def refused(source: Path, error: type[FAT5Error], match: str, to: str = "hf", **options: Any) -> None:
    """Refused in one line, and nothing is left beside the source."""
    before = sorted(path.name for path in source.parent.iterdir())
    with pytest.raises(error, match=match) as raised:
        run(source, to, **options)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in source.parent.iterdir()) == before
