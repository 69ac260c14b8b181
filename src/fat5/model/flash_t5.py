"""Checkpoints of the first FAT5 (model_type: flash_t5): their keys and tensor names, translated to T5's.

The old model is a T5 with a factor on its attention scores. The factor is folded into the query projections, so the
loaded model is a plain T5 and is saved as one. Facts: docs/compatibility.md; formulas: fat5.convert.flash_t5_formulas.
"""

import math
import re
from typing import Any

import torch
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
# Keys with the same meaning here. The file also has choices of kernels, and keys that transformers 4 derived
# (`is_gated_act`, `dense_act_fn`) from a `feed_forward_proj` that the old classes never read.
_SAME = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
    "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "initializer_factor",
    "dropout_rate", "classifier_dropout", "decoder_start_token_id", "eos_token_id", "bos_token_id", "use_cache",
    "num_labels", "id2label", "label2id", "problem_type", "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip
_POSITIONS = {"t5": "t5", "ALiBi": "alibi"}
_HEAD_FORMS = {"FlashT5ForSequenceClassification": "encoder-eos", "FlashT5ForQuestionAnswering": "encoder"}
_QUERIES = ("SelfAttention.q.weight", "EncDecAttention.q.weight")
_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def translate_configuration(found: dict[str, Any], where: object) -> dict[str, Any]:
    """FAT5's keys from a flash_t5 config.json; absent keys get the defaults of the old classes.

    Raises:
        CheckpointError: a key for which the old classes compute something that FAT5 does not.
    """
    positions = found.get("position_encoding_type", "t5")
    refused = {
        "position_encoding_type": positions not in _POSITIONS,
        "alibi_mode": positions == "ALiBi" and found.get("alibi_mode", "symetric") != "symetric",
        "use_randomized_position_encoding": bool(found.get("use_randomized_position_encoding", False)),
        "tie_word_embeddings": bool(found.get("tie_word_embeddings", False)),
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise CheckpointError(
                f"flash_t5 with {key} {found.get(key)!r}, which FAT5 does not compute",
                where=where,
                hint="give a checkpoint with T5's or symmetric ALiBi positions, not randomized, and untied embeddings",
            )
    activation = "gelu" if found.get("use_gelu_act", True) else "relu"
    plain = "gelu_new" if activation == "gelu" else "relu"
    pad = found.get("pad_token_id")
    classes = found.get("architectures") or [""]
    name = classes if isinstance(classes, str) else classes[0]
    return {key: found[key] for key in _SAME if key in found} | {
        "model_type": "flash_t5",
        "position_encoding": _POSITIONS[positions],
        "feed_forward_proj": f"gated-{activation}" if found.get("use_glu_mlp", False) else plain,
        "tie_word_embeddings": False,
        # The old file says False, pads labels with -100 and may have null factors of the loss.
        "is_encoder_decoder": True,
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "attention_dropout_rate": found.get("attention_dropout_rate") or 0.0,
        "z_loss": found.get("z_loss") or 0.0,
        "label_smoothing": found.get("label_smoothing") or 0.0,
        "head_form": _HEAD_FORMS.get(name),
    }


def attention_scale(found: dict[str, Any], where: object) -> float:
    """The factor on attention scores; by default the inverse root of the number of heads (not of their width).

    Raises:
        CheckpointError: it is no number.
    """
    scale, heads = found.get("attention_scale"), found.get("num_heads", 8)
    if scale is None and isinstance(heads, int) and heads > 0:
        return float(heads**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise CheckpointError(
            f"config.json cannot be used: attention_scale {scale!r} with num_heads {heads!r}",
            where=where,
            hint="restore it",
        )
    return float(scale)


def translate_tensors(tensors: dict[str, Tensor], scale: float, where: object) -> dict[str, Tensor]:
    """The tensors under T5's names, `scale` folded into the query projections, in float32 or wider.

    Raises:
        CheckpointError: keys and values in one tensor, as in an earlier version with other formulas.
    """
    translated, folded = {}, {}
    for old, tensor in tensors.items():
        if ".Wkv." in old:
            raise CheckpointError(
                f"{old} comes from a first version of flash_t5, whose decoder had other positions",
                where=where,
                hint="give a checkpoint that has Wk and Wv",
            )
        name = old
        for pattern, new in _PARTS:
            name = re.sub(pattern, new, name)
        if name.endswith(_QUERIES) and scale != 1.0:
            folded[name] = (tensor.double() * scale).to(torch.promote_types(tensor.dtype, torch.float32))
        else:
            translated[name] = tensor
    for copied in _TABLES:
        if copied in translated:
            translated.setdefault("shared.weight", translated.pop(copied))
    # The wider tensors last: without a dtype asked for, transformers takes that of the first.
    return translated | folded
