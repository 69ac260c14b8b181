"""Checkpoints of the first FAT5 (model_type: flash_t5): their keys and names, said in T5's.

The formulas are T5's with a factor on the attention scores, which is folded into the query projections; so what is
loaded is a plain T5, and is saved as one. Facts: docs/compatibility.md; formulas: tests/parity/test_flash_t5.py.
"""

import re
from typing import Any

from torch import Tensor

from fat5.errors import CheckpointError

# Old part of a name → T5's. The feed-forward's place is 1 in the encoder and 2 in the decoder.
_PARTS = (
    (r"\.self_attention_layer\.self_attention\.W([qkv])\.", r".layer.0.SelfAttention.\1."),
    (r"\.self_attention_layer\.self_attention\.o\.", ".layer.0.SelfAttention.o."),
    (
        r"\.self_attention_layer\.self_attention\.pe_encoding\.relative_attention_bias\.",
        ".layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"\.self_attention_layer\.layer_norm\.", ".layer.0.layer_norm."),
    (r"\.cross_attention_layer\.cross_attention\.W([qkv])\.", r".layer.1.EncDecAttention.\1."),
    (r"\.cross_attention_layer\.cross_attention\.o\.", ".layer.1.EncDecAttention.o."),
    (r"\.cross_attention_layer\.layer_norm\.", ".layer.1.layer_norm."),
    (r"(encoder\.block\.\d+)\.ff_layer\.layer_norm\.", r"\1.layer.1.layer_norm."),
    (r"(decoder\.block\.\d+)\.ff_layer\.layer_norm\.", r"\1.layer.2.layer_norm."),
    (r"(encoder\.block\.\d+)\.ff_layer\.(?:act\.)?(wi|wi_0|wi_1|wo)\.", r"\1.layer.1.DenseReluDense.\2."),
    (r"(decoder\.block\.\d+)\.ff_layer\.(?:act\.)?(wi|wi_0|wi_1|wo)\.", r"\1.layer.2.DenseReluDense.\2."),
)


def translate_configuration(found: dict[str, Any], where: object) -> dict[str, Any]:
    """T5's keys from a flash_t5 config.json.

    Raises:
        CheckpointError: positions other than T5's, whose published variants are not read.
    """
    positions = str(found.get("position_encoding_type") or "t5")
    if positions.lower() != "t5":
        raise CheckpointError(
            f"flash_t5 with position_encoding_type {positions!r}; only T5 positions are read",
            where=where,
            hint="give a checkpoint with T5 positions",
        )
    activation = "gelu" if found.get("use_gelu_act", True) else "relu"
    gated = found.get("use_glu_mlp", True)
    # Absent, T5's; null, what the old model makes of None: the root of the number of heads, not of their width.
    scale = found.get("attention_scale", 1.0)
    if scale is None:
        scale = int(found.get("num_heads", 8)) ** -0.5
    pad = found.get("pad_token_id")
    untouched = {key: value for key, value in found.items() if key not in _DROPPED}
    return untouched | {
        "feed_forward_proj": f"gated-{activation}" if gated else ("gelu_new" if activation == "gelu" else "relu"),
        "tie_word_embeddings": bool(found.get("tie_word_embeddings", False)),
        "flash_t5_attention_scale": float(scale),
        # The old model says False of itself, pads labels with -100 and leaves factors of its loss null.
        "is_encoder_decoder": True,
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "z_loss": found.get("z_loss") or 0.0,
        "label_smoothing": found.get("label_smoothing") or 0.0,
        "architectures": None,
    }


def translate_tensors(tensors: dict[str, Tensor], attention_scale: float) -> dict[str, Tensor]:
    """The tensors under T5's names, `attention_scale` folded into the query projections."""
    translated = {}
    for old, tensor in tensors.items():
        name = old
        for pattern, new in _PARTS:
            name = re.sub(pattern, new, name)
        if name.endswith(("SelfAttention.q.weight", "EncDecAttention.q.weight")) and attention_scale != 1.0:
            tensor = (tensor.double() * attention_scale).to(tensor.dtype)
        translated[name] = tensor
    for copied in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if copied in translated:
            translated.setdefault("shared.weight", translated.pop(copied))
    return translated


# Choices of kernels and of position encodings that T5 positions do not read, and keys said anew above.
_DROPPED = (
    "model_type", "auto_map", "attention_scale", "attention_type", "position_encoding_type", "use_glu_mlp",
    "use_gelu_act", "use_full_bias_size", "use_masking", "use_randomized_position_encoding", "alibi_mode",
    "max_sequence_length", "fire_mlp_width", "rotary_emb_fraction", "rotary_base", "rotary_interleaved",
    "rotary_scale_base", "use_triton_layernorm", "use_triton_crossentropy", "use_triton_gated_mlp",
    "crossentropy_inplace_backward", "use_flash_attention", "feed_forward_proj",
)  # fmt: skip
