"""Checkpoints of the first FAT5 (`flash_t5`) give the logits that their own formulas imply.

The formulas, written here once more in float64 and over the old names (x a token's vector, W its matrices):

    norm(x) = w * x / sqrt(mean(x^2) + eps)
    attention: softmax(attention_scale * Wq x (Wk y)^T + bias) Wv y, then o; the bias, of block 0's table, in every
        block's self-attention, none in cross-attention
    feed-forward: wo(act(wi_0 x) * wi_1 x), or wo(act(wi x)); act = tanh-GELU or ReLU
    each added to its input; logits = lm_head(norm(x)), unscaled
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from stock import difference
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from fat5.errors import CheckpointError
from fat5.model import FAT5EncoderModel, FAT5ForConditionalGeneration

# Formulas in float64 against a model in float32, whose rounding unscaled attention over weights this large amplifies:
# 5e-6 to 1.2e-5, according to the processor's instructions. The other GELU (erf for tanh) is off by 3e-4 and more.
FORMULAS_TOLERANCE = 5e-5
WIDTH, HEADS, HEAD, INNER, LAYERS, VOCABULARY = 24, 3, 8, 40, 2, 99
BUCKETS, REACH, EPS = 32, 128, 1e-6
# Keys as the old configuration wrote them, with what is odd in them.
KEYS = {
    "model_type": "flash_t5", "architectures": ["FlashT5ForConditionalGeneration"], "vocab_size": VOCABULARY,
    "d_model": WIDTH, "d_kv": HEAD, "d_ff": INNER, "num_heads": HEADS, "num_layers": LAYERS,
    "num_decoder_layers": LAYERS, "dropout_rate": 0.0, "position_encoding_type": "t5", "pad_token_id": -100,
    "decoder_start_token_id": 0, "eos_token_id": 1, "is_encoder_decoder": False, "z_loss": None,
    "tie_word_embeddings": False, "use_full_bias_size": True, "attention_type": "ref", "use_triton_layernorm": False,
    "auto_map": {"AutoModel": "modeling_flash_t5.FlashT5ForConditionalGeneration"},
}  # fmt: skip
VARIANTS = {
    "gated GELU, scale 1": {"use_glu_mlp": True, "use_gelu_act": True, "attention_scale": 1.0},
    "gated GELU, scale 0.35": {"use_glu_mlp": True, "use_gelu_act": True, "attention_scale": 0.35},
    "ReLU, scale null": {"use_glu_mlp": False, "use_gelu_act": False, "attention_scale": None},
    "GELU, no scale": {"use_glu_mlp": False, "use_gelu_act": True},
    "gated ReLU, scale 0.5": {"use_glu_mlp": True, "use_gelu_act": False, "attention_scale": 0.5},
}
EVERY_VARIANT = pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS.keys())


def made(keys: dict) -> dict[str, Tensor]:
    """Random weights under the old names."""
    tensors = {"shared.weight": torch.randn(VOCABULARY, WIDTH), "lm_head.weight": torch.randn(VOCABULARY, WIDTH)}
    inner = HEADS * HEAD
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.final_layer_norm.weight"] = torch.rand(WIDTH) + 0.5
        for i in range(LAYERS):
            block = f"{stack}.block.{i}"
            for part in ("self", "cross")[: 1 + (stack == "decoder")]:
                layer = f"{block}.{part}_attention_layer"
                tensors[f"{layer}.layer_norm.weight"] = torch.rand(WIDTH) + 0.5
                for name in "qkv":
                    tensors[f"{layer}.{part}_attention.W{name}.weight"] = 0.3 * torch.randn(inner, WIDTH)
                tensors[f"{layer}.{part}_attention.o.weight"] = 0.3 * torch.randn(WIDTH, inner)
            tensors[f"{block}.ff_layer.layer_norm.weight"] = torch.rand(WIDTH) + 0.5
            for name in ("wi_0", "wi_1") if keys["use_glu_mlp"] else ("wi",):
                tensors[f"{block}.ff_layer.act.{name}.weight"] = 0.3 * torch.randn(INNER, WIDTH)
            tensors[f"{block}.ff_layer.wo.weight"] = 0.3 * torch.randn(WIDTH, INNER)
        table = f"{stack}.block.0.self_attention_layer.self_attention.pe_encoding.relative_attention_bias.weight"
        tensors[table] = torch.randn(BUCKETS, HEADS)
    return tensors


def bucket(distance: int, bidirectional: bool) -> int:
    """T5's (Raffel et al. 2020, section 2.1): half of the buckets exact, the others logarithmic up to REACH."""
    buckets = BUCKETS // 2 if bidirectional else BUCKETS
    side = buckets if bidirectional and distance > 0 else 0
    behind = abs(distance) if bidirectional else max(-distance, 0)
    exact = buckets // 2
    if behind < exact:
        return side + behind
    return side + min(buckets - 1, exact + int(math.log(behind / exact) / math.log(REACH / exact) * (buckets - exact)))


class Formulas:
    """The model of the docstring above, one text at a time."""

    def __init__(self, tensors: dict[str, Tensor], keys: dict) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.keys = keys
        scale = keys.get("attention_scale", 1.0)
        self.scale = HEADS**-0.5 if scale is None else scale

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self[name] * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()

    def attention(self, name: str, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            (source @ self[f"{name}.W{part}"].T).view(len(source), HEADS, HEAD).transpose(0, 1)
            for part, source in (("q", x), ("k", y), ("v", y))
        )
        weights = torch.softmax(self.scale * query @ key.transpose(1, 2) + bias, dim=-1)
        return (weights @ value).transpose(0, 1).reshape(len(x), -1) @ self[f"{name}.o"].T

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        def act(y: Tensor) -> Tensor:
            return torch.nn.functional.gelu(y, approximate="tanh") if self.keys["use_gelu_act"] else y.clamp(min=0)

        if self.keys["use_glu_mlp"]:
            inner = act(x @ self[f"{name}.act.wi_0"].T) * (x @ self[f"{name}.act.wi_1"].T)
        else:
            inner = act(x @ self[f"{name}.act.wi"].T)
        return inner @ self[f"{name}.wo"].T

    def stack(self, stack: str, ids: Tensor, memory: Tensor | None = None) -> Tensor:
        x, causal = self["shared"][ids], memory is not None
        table = self[f"{stack}.block.0.self_attention_layer.self_attention.pe_encoding.relative_attention_bias"]
        index = [[bucket(k - q, not causal) for k in range(len(ids))] for q in range(len(ids))]
        bias = table[torch.tensor(index)].permute(2, 0, 1)
        if causal:
            bias = bias.masked_fill(torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1), -math.inf)
        for i in range(LAYERS):
            block = f"{stack}.block.{i}"
            layer = f"{block}.self_attention_layer"
            normed = self.norm(f"{layer}.layer_norm", x)
            x = x + self.attention(f"{layer}.self_attention", normed, normed, bias)
            if memory is not None:
                layer = f"{block}.cross_attention_layer"
                normed = self.norm(f"{layer}.layer_norm", x)
                x = x + self.attention(f"{layer}.cross_attention", normed, memory, torch.zeros(()))
            x = x + self.feed_forward(f"{block}.ff_layer", self.norm(f"{block}.ff_layer.layer_norm", x))
        return self.norm(f"{stack}.final_layer_norm", x)

    def logits(self, ids: Tensor, decoder_ids: Tensor) -> Tensor:
        return self.stack("decoder", decoder_ids, self.stack("encoder", ids)) @ self["lm_head"].T


@pytest.fixture
def old(tmp_path):
    """Writes a folder of the old kind; returns it and its formulas."""

    def write(keys: dict, binary: bool = False):
        tensors = made(keys)
        (tmp_path / "config.json").write_text(json.dumps(KEYS | keys))
        if binary:
            copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
            torch.save(tensors | copies, tmp_path / "pytorch_model.bin")
        else:
            save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path, Formulas(tensors, keys)

    return write


@EVERY_VARIANT
def test_logits_are_those_of_the_formulas(keys, old):
    folder, formulas = old(keys)
    ours = FAT5ForConditionalGeneration.from_pretrained(folder).eval()
    # Beyond REACH, where all distances share a bucket; and a second row of another length.
    lengths, ids = (REACH + 40, 9), torch.randint(2, VOCABULARY, (2, REACH + 40))
    decoder_ids = torch.randint(2, VOCABULARY, (2, 20))
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    got = ours(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
    for row, length in enumerate(lengths):
        assert difference(got[row], formulas.logits(ids[row, :length], decoder_ids[row])) <= FORMULAS_TOLERANCE


@EVERY_VARIANT
def test_saved_again_it_is_a_stock_t5(keys, old, tmp_path_factory):
    folder, formulas = old(keys, binary=True)
    again = tmp_path_factory.mktemp("again")
    FAT5ForConditionalGeneration.from_pretrained(folder).save_pretrained(again)
    stock = AutoModelForSeq2SeqLM.from_pretrained(again).eval()
    assert type(stock).__name__ == "T5ForConditionalGeneration"
    ids, decoder_ids = torch.randint(2, VOCABULARY, (1, 30)), torch.randint(2, VOCABULARY, (1, 9))
    got = stock(input_ids=ids, decoder_input_ids=decoder_ids).logits[0]
    assert difference(got, formulas.logits(ids[0], decoder_ids[0])) <= FORMULAS_TOLERANCE


def test_it_trains_encodes_and_generates(old):
    keys = VARIANTS["gated GELU, scale 0.35"]
    folder, formulas = old(keys)
    ours = FAT5ForConditionalGeneration.from_pretrained(folder).eval()
    ids, labels = torch.randint(2, VOCABULARY, (1, 30)), torch.tensor([[5, 6, -100, -100]])
    want = formulas.logits(ids[0], torch.tensor([0, 5, 6, 0]))[:2].log_softmax(-1)
    loss = -(want[0, 5] + want[1, 6]) / 2
    assert difference(ours(input_ids=ids, labels=labels).loss[None], loss[None]) <= FORMULAS_TOLERANCE
    written = ours.generate(ids, max_new_tokens=6, min_new_tokens=6)[0]
    for step in range(1, 7):
        scores = formulas.logits(ids[0], written[:step])[-1]
        scores[1] = -math.inf  # min_new_tokens forbids the end
        assert int(written[step]) == int(scores.argmax())
    encoder = FAT5EncoderModel.from_pretrained(folder).eval()
    assert difference(encoder(ids).last_hidden_state[0], formulas.stack("encoder", ids[0])) <= FORMULAS_TOLERANCE


def test_its_generation_settings_come_along(old):
    folder, _ = old(VARIANTS["gated GELU, scale 1"])
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 3}))
    assert FAT5ForConditionalGeneration.from_pretrained(folder).generation_config.num_beams == 3


@pytest.mark.parametrize("binary", [False, True])
def test_a_name_on_the_hub(binary, old, tmp_path_factory):
    """As it lies in the cache after a download."""
    keys = VARIANTS["gated GELU, scale 0.35"]
    folder, formulas = old(keys, binary)
    cache = tmp_path_factory.mktemp("hub")
    commit = "0" * 40
    shutil.copytree(folder, cache / "models--some--flash-t5" / "snapshots" / commit)
    (cache / "models--some--flash-t5" / "refs").mkdir()
    (cache / "models--some--flash-t5" / "refs" / "main").write_text(commit)
    ours = FAT5ForConditionalGeneration.from_pretrained("some/flash-t5", cache_dir=cache, local_files_only=True).eval()
    ids, decoder_ids = torch.randint(2, VOCABULARY, (1, 30)), torch.randint(2, VOCABULARY, (1, 9))
    got = ours(input_ids=ids, decoder_input_ids=decoder_ids).logits[0]
    assert difference(got, formulas.logits(ids[0], decoder_ids[0])) <= FORMULAS_TOLERANCE


@pytest.mark.parametrize("positions", ["ALiBi", "RoPE", "FIRE"])
def test_other_positions_are_refused(positions, old):
    folder, _ = old(VARIANTS["gated GELU, scale 1"] | {"position_encoding_type": positions})
    with pytest.raises(CheckpointError, match=f"position_encoding_type '{positions}'; only T5 positions are read"):
        FAT5ForConditionalGeneration.from_pretrained(folder)
