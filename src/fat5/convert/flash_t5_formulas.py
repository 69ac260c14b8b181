"""The first FAT5's model (flash_t5) by its own formulas, over its own names and keys.

A converted copy is compared with it, so it shares nothing with the loader but the reading of files.

    norm(x) = w * x / sqrt(mean(x^2) + eps)
    attention: softmax(scale * Wq x (Wk y)^T + bias) Wv y, then o; the bias in every block's self-attention, from block
        0's table by T5's buckets or ALiBi's -slope * distance; none in cross-attention
    feed-forward: wo(act(wi_0 x) * wi_1 x), or wo(act(wi x)); act = tanh-GELU or ReLU
    each added to its input; logits = lm_head(norm(x)), unscaled
    heads: on the encoder; a text's class from its state at the last EOS, out_proj(tanh(dense(x)))

Source: github.com/catie-aq/flashT5, src/model/{modeling,custom_heads,configuration}_flash_t5.py and
src/utils/positional_encoding.py: formulas and defaults.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fat5.model.loading import read_tensors

# Formulas in float64 against a model in float32, whose rounding unscaled attention over large weights amplifies: 5e-6
# to 1.2e-5, according to the processor's instructions. The other GELU (erf for tanh) is off by 3e-4 and more.
FORMULAS_TOLERANCE = 5e-5


class FlashT5Formulas:
    """Computes in float64, one text at a time, from tensors and keys under their old names.

    `kind`, the class's name without FlashT5, decides which outputs a call computes.
    """

    def __init__(
        self, tensors: dict[str, Tensor], keys: dict[str, Any], kind: str = "ForConditionalGeneration"
    ) -> None:
        self.tensors, self.keys, self.kind = tensors, keys, kind
        self.heads = keys["num_heads"]
        scale = keys.get("attention_scale")
        self.scale = self.heads**-0.5 if scale is None else scale

    @classmethod
    def of_folder(cls, folder: Path, kind: str) -> "FlashT5Formulas":
        """The formulas over a checkpoint's tensors and keys."""
        return cls(read_tensors(folder), json.loads((folder / "config.json").read_text()), kind)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"].double()

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Outputs by name, as a model of transformers returns them, for rows padded on the right; zeros at padding."""
        texts = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask)]
        encoded = [self.stack("encoder", ids) for ids in texts]
        if self.kind == "ForSequenceClassification":
            eos = self.keys.get("eos_token_id", 1)
            last = torch.stack([x[ids == eos][-1] for x, ids in zip(encoded, texts)])
            inner = torch.tanh(self.linear("classification_head.dense", last))
            return {"logits": self.linear("classification_head.out_proj", inner)}
        if self.kind in ("ForConditionalGeneration", "Model"):
            assert decoder_input_ids is not None
            decoded = torch.stack([self.stack("decoder", ids, x) for ids, x in zip(decoder_input_ids, encoded)])
            if self.kind == "Model":
                return {"last_hidden_state": decoded}
            return {"logits": decoded @ self["lm_head"].T}
        padded = pad_sequence(encoded, batch_first=True)
        if self.kind == "EncoderModel":
            return {"last_hidden_state": padded}
        if self.kind == "ForTokenClassification":
            return {"logits": self.linear("classifier", padded)}
        start, end = self.linear("qa_outputs", padded).unbind(-1)
        return {"start_logits": start, "end_logits": end}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self[name].T + self.tensors[f"{name}.bias"].double()

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self[name] * x / (x.square().mean(-1, keepdim=True) + self.keys.get("layer_norm_epsilon", 1e-6)).sqrt()

    def attention(self, name: str, x: Tensor, y: Tensor, bias: Tensor | float) -> Tensor:
        query, key, value = (
            (source @ self[f"{name}.W{part}"].T).view(len(source), self.heads, -1).transpose(0, 1)
            for part, source in (("q", x), ("k", y), ("v", y))
        )
        weights = torch.softmax(self.scale * query @ key.transpose(1, 2) + bias, dim=-1)
        return (weights @ value).transpose(0, 1).reshape(len(x), -1) @ self[f"{name}.o"].T

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        gated = self.keys.get("use_glu_mlp", False)
        inner = x @ self[f"{name}.act.wi_0" if gated else f"{name}.act.wi"].T
        inner = F.gelu(inner, approximate="tanh") if self.keys.get("use_gelu_act", True) else F.relu(inner)
        if gated:
            inner = inner * (x @ self[f"{name}.act.wi_1"].T)
        return inner @ self[f"{name}.wo"].T

    def bias(self, stack: str, length: int) -> Tensor:
        """(heads, length, length), -inf where a decoder looks ahead."""
        causal = stack == "decoder"
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        if self.keys.get("position_encoding_type", "t5") == "ALiBi":
            bias = -torch.tensor(slopes(self.heads)).double()[:, None, None] * distance.abs()
        else:
            first = f"{stack}.block.0.self_attention_layer.self_attention"
            bucket = self.bucket(distance, not causal)
            bias = self[f"{first}.pe_encoding.relative_attention_bias"][bucket].permute(2, 0, 1)
        return bias.masked_fill(distance > 0, -math.inf) if causal else bias

    def bucket(self, distance: Tensor, bidirectional: bool) -> Tensor:
        """T5's (Raffel et al. 2020, section 2.1): half of the buckets exact, the others logarithmic up to a reach."""
        reach = self.keys.get("relative_attention_max_distance", 128)
        buckets = self.keys.get("relative_attention_num_buckets", 32) // (2 if bidirectional else 1)
        side = buckets * (distance > 0) if bidirectional else 0
        behind = distance.abs() if bidirectional else (-distance).clamp(min=0)
        exact = buckets // 2
        share = (behind.clamp(min=1).double() / exact).log() / math.log(reach / exact)
        far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
        return side + torch.where(behind < exact, behind, far)

    def stack(self, stack: str, ids: Tensor, memory: Tensor | None = None) -> Tensor:
        """Hidden states (L, d_model) of one text."""
        # Names of the same table; how the model was saved decides which of them are stored.
        tables = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
        x = self[next(name for name in tables if f"{name}.weight" in self.tensors)][ids]
        bias = self.bias(stack, len(ids))
        layers = self.keys["num_layers"]
        if stack == "decoder":
            layers = self.keys.get("num_decoder_layers") or layers
        for i in range(layers):
            block = f"{stack}.block.{i}"
            layer = f"{block}.self_attention_layer"
            normed = self.norm(f"{layer}.layer_norm", x)
            x = x + self.attention(f"{layer}.self_attention", normed, normed, bias)
            if memory is not None:
                layer = f"{block}.cross_attention_layer"
                normed = self.norm(f"{layer}.layer_norm", x)
                x = x + self.attention(f"{layer}.cross_attention", normed, memory, 0.0)
            x = x + self.feed_forward(f"{block}.ff_layer", self.norm(f"{block}.ff_layer.layer_norm", x))
        return self.norm(f"{stack}.final_layer_norm", x)


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes: 2^(-8/n) and its powers if n is a power of two; further heads take every other slope of 2n."""
    power = 2 ** int(math.log2(heads))
    found = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    return found if power == heads else found + slopes(2 * power)[0::2][: heads - power]
