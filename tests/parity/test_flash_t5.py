"""Checkpoints of the first FAT5 (`flash_t5`) give the logits that their own formulas imply.

The formulas are written once more, in float64 and over the old names and keys: fat5.convert.flash_t5_formulas.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

import fat5
from fat5.convert.flash_t5_formulas import FORMULAS_TOLERANCE, FlashT5Formulas
from fat5.errors import CheckpointError
from fat5.model import FAT5Config, FAT5EncoderModel, FAT5ForConditionalGeneration, FAT5ForSequenceClassification
from stock import difference

WIDTH, HEADS, HEAD, INNER, LAYERS, VOCABULARY = 24, 3, 8, 40, 2, 99
BUCKETS, REACH = 32, 128
# Keys as the old configuration wrote them, with what is odd in them. The three about the feed-forward are transformers
# 4's, which derived the last two from the first; the old classes read none of them.
KEYS = {
    "model_type": "flash_t5", "architectures": ["FlashT5ForConditionalGeneration"], "vocab_size": VOCABULARY,
    "d_model": WIDTH, "d_kv": HEAD, "d_ff": INNER, "num_heads": HEADS, "num_layers": LAYERS,
    "num_decoder_layers": LAYERS, "dropout_rate": 0.0, "position_encoding_type": "t5", "pad_token_id": -100,
    "decoder_start_token_id": 0, "eos_token_id": 1, "is_encoder_decoder": False, "z_loss": None,
    "feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False,
    "tie_word_embeddings": False, "use_full_bias_size": True, "attention_type": "ref", "use_triton_layernorm": False,
    "auto_map": {"AutoModel": "modeling_flash_t5.FlashT5ForConditionalGeneration"},
}  # fmt: skip
VARIANTS = {
    "gated GELU, scale 1": {"use_glu_mlp": True, "use_gelu_act": True, "attention_scale": 1.0},
    "gated GELU, scale 0.35": {"use_glu_mlp": True, "use_gelu_act": True, "attention_scale": 0.35},
    "ReLU, scale null": {"use_glu_mlp": False, "use_gelu_act": False, "attention_scale": None},
    "GELU, no scale": {"use_glu_mlp": False, "use_gelu_act": True},
    "gated ReLU, scale 0.5": {"use_glu_mlp": True, "use_gelu_act": False, "attention_scale": 0.5},
    "defaults": {},
}
HEADS_OF = {
    "ForSequenceClassification": {"classification_head.dense": WIDTH, "classification_head.out_proj": 3},
    "ForTokenClassification": {"classifier": 3},
    "ForQuestionAnswering": {"qa_outputs": 2},
}
EVERY_VARIANT = pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS.keys())


def made(keys: dict, kind: str = "ForConditionalGeneration") -> dict[str, Tensor]:
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
            for name in ("wi_0", "wi_1") if keys.get("use_glu_mlp") else ("wi",):
                tensors[f"{block}.ff_layer.act.{name}.weight"] = 0.3 * torch.randn(INNER, WIDTH)
            tensors[f"{block}.ff_layer.wo.weight"] = 0.3 * torch.randn(WIDTH, INNER)
        if keys.get("position_encoding_type") != "ALiBi":
            table = f"{stack}.block.0.self_attention_layer.self_attention.pe_encoding.relative_attention_bias.weight"
            tensors[table] = torch.randn(BUCKETS, HEADS)
    if kind in HEADS_OF:
        tensors = {name: x for name, x in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
        for name, rows in HEADS_OF[kind].items():
            tensors |= {f"{name}.weight": torch.randn(rows, WIDTH), f"{name}.bias": torch.randn(rows)}
    return tensors


@pytest.fixture
def old(tmp_path):
    """Writes a folder of the old kind; returns it and its formulas."""

    def write(keys: dict, binary: bool = False, kind: str = "ForConditionalGeneration", dtype=torch.float32):
        tensors = {name: x.to(dtype) for name, x in made(keys, kind).items()}
        written = KEYS | keys | {"architectures": [f"FlashT5{kind}"]}
        (tmp_path / "config.json").write_text(json.dumps(written))
        if binary:
            copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
            torch.save(tensors | copies, tmp_path / "pytorch_model.bin")
        else:
            save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path, FlashT5Formulas(tensors, written, kind)

    return write


def rows():
    """Texts that end in EOS: one longer than REACH, beyond which all distances share a bucket, and one of 9 tokens."""
    lengths, ids = (REACH + 40, 9), torch.randint(2, VOCABULARY, (2, REACH + 40))
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids[torch.arange(2), torch.tensor(lengths) - 1] = 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_logits(model, formulas):
    given = rows() | {"decoder_input_ids": torch.randint(2, VOCABULARY, (2, 20))}
    assert difference(model.eval()(**given).logits, formulas(**given)["logits"]) <= FORMULAS_TOLERANCE


@EVERY_VARIANT
def test_logits_are_those_of_the_formulas(keys, old):
    folder, formulas = old(keys)
    assert_logits(FAT5ForConditionalGeneration.from_pretrained(folder), formulas)


@pytest.mark.parametrize(
    ("keys", "read"),
    [
        ({"use_glu_mlp": True, "use_gelu_act": True}, ("gated-gelu", True, "gelu_new")),
        ({"use_glu_mlp": False, "use_gelu_act": True}, ("gelu_new", False, "gelu_new")),
        ({"use_glu_mlp": False, "use_gelu_act": False}, ("relu", False, "relu")),
        ({"use_glu_mlp": True, "use_gelu_act": False}, ("gated-relu", True, "relu")),
        ({}, ("gelu_new", False, "gelu_new")),
    ],
    ids=str,
)
def test_keys_that_transformers_derived_are_not_read(keys, read, old):
    folder, _ = old(keys)
    config = FAT5Config.from_pretrained(folder)
    assert (config.feed_forward_proj, config.is_gated_act, config.dense_act_fn) == read


def test_keywords_change_the_configuration(old):
    """As of a t5 folder."""
    folder, _ = old({"dropout_rate": 0.1})
    ours = FAT5ForConditionalGeneration.from_pretrained(folder, dropout_rate=0.25, label_smoothing=0.1)
    assert (ours.config.dropout_rate, ours.encoder.dropout.p, ours.config.label_smoothing) == (0.25, 0.25, 0.1)
    classifier = FAT5ForSequenceClassification.from_pretrained(folder, num_labels=3, dropout_rate=0)
    assert classifier(**rows()).logits.shape == (2, 3)


def test_the_scale_is_folded_in_float32(old):
    """Weights in bfloat16, and a factor that bfloat16 would round."""
    folder, formulas = old(VARIANTS["gated GELU, scale 0.35"], dtype=torch.bfloat16)
    assert_logits(FAT5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), formulas)
    assert FAT5ForConditionalGeneration.from_pretrained(folder).dtype == torch.bfloat16


def test_symmetric_alibi(old, tmp_path_factory):
    """Of three heads, whose slopes are not those of a power of two alone."""
    folder, formulas = old(VARIANTS["gated GELU, scale 0.35"] | {"position_encoding_type": "ALiBi"})
    ours = FAT5ForConditionalGeneration.from_pretrained(folder)
    assert_logits(ours, formulas)
    again = tmp_path_factory.mktemp("again")
    ours.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["model_type"] == "fat5"


@pytest.mark.parametrize("kind", HEADS_OF)
def test_heads(kind, old, tmp_path_factory):
    """On the encoder; a text's class from its state at the last EOS, and not from their mean."""
    labels = {str(i): f"label {i}" for i in range(2 if kind == "ForQuestionAnswering" else 3)}
    folder, formulas = old(VARIANTS["gated GELU, scale 0.35"] | {"id2label": labels}, kind=kind)
    cls = getattr(fat5, f"FAT5{kind}")
    given, again = rows(), tmp_path_factory.mktemp("again")
    want = formulas(**given)
    if kind == "ForSequenceClassification":  # a copy of theirs wrote the name alone, without a list
        keys = json.loads((folder / "config.json").read_text()) | {"architectures": f"FlashT5{kind}"}
        (folder / "config.json").write_text(json.dumps(keys))
    ours = cls.from_pretrained(folder).eval()
    ours.save_pretrained(again)
    for model in (ours, cls.from_pretrained(again).eval()):
        got = model(**given)
        for name in want:
            at = given["attention_mask"].bool() if want[name].shape[1] > 3 else ...
            assert difference(got[name][at], want[name][at]) <= FORMULAS_TOLERANCE


def test_an_answering_head_that_read_a_decoder(old):
    folder, _ = old(VARIANTS["gated GELU, scale 1"])
    tensors = load_file(folder / "model.safetensors") | made(VARIANTS["gated GELU, scale 1"], "ForQuestionAnswering")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="head_form='encoder-decoder'"):
        fat5.FAT5ForQuestionAnswering.from_pretrained(folder)
    assert fat5.FAT5ForQuestionAnswering.from_pretrained(folder, head_form="encoder-decoder").has_decoder


@EVERY_VARIANT
def test_saved_again_it_is_a_stock_t5(keys, old, tmp_path_factory):
    folder, formulas = old(keys, binary=True)
    again = tmp_path_factory.mktemp("again")
    FAT5ForConditionalGeneration.from_pretrained(folder).save_pretrained(again)
    stock = AutoModelForSeq2SeqLM.from_pretrained(again)
    assert type(stock).__name__ == "T5ForConditionalGeneration"
    assert_logits(stock, formulas)


def test_it_trains_encodes_and_generates(old):
    keys = VARIANTS["gated GELU, scale 0.35"]
    folder, formulas = old(keys)
    ours = FAT5ForConditionalGeneration.from_pretrained(folder).eval()
    ids, labels = torch.randint(2, VOCABULARY, (1, 30)), torch.tensor([[5, 6, -100, -100]])
    want = logits(formulas, ids[0], torch.tensor([0, 5, 6, 0]))[:2].log_softmax(-1)
    loss = -(want[0, 5] + want[1, 6]) / 2
    assert difference(ours(input_ids=ids, labels=labels).loss[None], loss[None]) <= FORMULAS_TOLERANCE
    written = ours.generate(ids, max_new_tokens=6, min_new_tokens=6)[0]
    for step in range(1, 7):
        scores = logits(formulas, ids[0], written[:step])[-1]
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
    ours = FAT5ForConditionalGeneration.from_pretrained("some/flash-t5", cache_dir=cache, local_files_only=True)
    assert_logits(ours, formulas)


@pytest.mark.parametrize(
    "key",
    [
        {"position_encoding_type": "RoPE"},
        {"position_encoding_type": "FIRE"},
        {"position_encoding_type": None},
        {"position_encoding_type": "ALiBi", "alibi_mode": "asymetric"},
        {"use_randomized_position_encoding": True},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_keys_by_which_they_compute_something_else_are_refused(key, old):
    folder, _ = old(VARIANTS["gated GELU, scale 1"] | key)
    name, value = list(key.items())[-1]
    with pytest.raises(CheckpointError, match=f"flash_t5 with {name} {value!r}, which FAT5 does not compute"):
        FAT5ForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    "key",
    [{"attention_scale": "x"}, {"attention_scale": math.nan}, {"attention_scale": True}, {"num_heads": 0}],
    ids=str,
)
def test_a_scale_that_is_no_number_is_refused(key, old):
    folder, _ = old({"use_glu_mlp": True})
    (folder / "config.json").write_text(json.dumps(KEYS | {"use_glu_mlp": True} | key))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used: attention_scale"):
        FAT5ForConditionalGeneration.from_pretrained(folder)


def test_keys_and_values_in_one_tensor_are_refused(old):
    """As in the first weeks, when the decoder's positions were computed otherwise too."""
    folder, _ = old(VARIANTS["gated GELU, scale 1"])
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".Wk." in name]:
        pair = [tensors.pop(name), tensors.pop(name.replace(".Wk.", ".Wv."))]
        tensors[name.replace(".Wk.", ".Wkv.")] = torch.cat(pair)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"Wkv\.weight comes from a first version of flash_t5"):
        FAT5ForConditionalGeneration.from_pretrained(folder)


def logits(formulas: FlashT5Formulas, ids: torch.Tensor, decoder_ids: torch.Tensor) -> torch.Tensor:
    """(U, vocabulary) of one text (L,) and one decoder input (U,)."""
    return formulas.stack("decoder", decoder_ids, formulas.stack("encoder", ids)) @ formulas["lm_head"].T
